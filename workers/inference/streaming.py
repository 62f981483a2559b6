"""A ticket's events as OpenAI's server-sent events, or gathered into one object."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api_schemas.errors import ErrorResponse
from workers.inference.answers import AnswerShape, usage_of
from workers.inference.engine import Ticket
from workers.inference.errors import error_body
from workers.inference.tasks import Piece, ScoredToken, Started

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


class TicketStream(StreamingResponse):
    """Streams a ticket, and gives the ticket up when the client goes away."""

    def __init__(self, ticket: Ticket, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; whatever ends it, the ticket is given up (no matter when it is finished already)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


async def gather(ticket: Ticket, started: Started, shape: AnswerShape) -> dict[str, Any]:
    """Return the whole answer.

    Raises:
        ModepressError: generation ended with an error.
    """
    texts: list[str] = []
    scores: list[ScoredToken] = []
    while True:
        piece = await ticket.next()
        if not isinstance(piece, Piece):
            continue
        texts.append(piece.text)
        scores += piece.scores
        if piece.finish_reason is not None:
            usage = usage_of(started.prompt_tokens, piece.tokens)
            return shape.whole("".join(texts), piece.finish_reason, usage, scores)


async def event_lines(
    ticket: Ticket, started: Started, shape: AnswerShape, *, include_usage: bool, count_tokens: bool = False
) -> AsyncIterator[str]:
    """Yield `data:` lines: role (chat), text, finish, usage when asked for, `[DONE]`.

    An error on the way is a line with a top-level `error`, and the last one. With `count_tokens` a comment, which
    clients pass over, says before the end how many tokens were read and generated: the API counts them per owner.
    """
    extra = {"usage": None} if include_usage else {}
    if shape.kind == "chat":
        yield _line(shape.role() | extra)
    try:
        async for piece in _pieces(ticket):
            if piece.text or piece.scores:
                yield _line(shape.text(piece.text, piece.scores) | extra)
            if piece.finish_reason is not None:
                yield _line(shape.finish(piece.finish_reason) | extra)
                if include_usage:
                    yield _line(shape.usage(usage_of(started.prompt_tokens, piece.tokens)))
                if count_tokens:
                    yield f": tokens {started.prompt_tokens + piece.tokens}\n\n"
                yield DONE
    except Exception as error:  # noqa: BLE001  (the status line is gone; the stream itself reports it)
        logger.warning("a stream of %s ended with an error: %s", shape.model, error)
        yield _line(ErrorResponse(error=error_body(error)).model_dump())


async def _pieces(ticket: Ticket) -> AsyncIterator[Piece]:
    finished = False
    while not finished:
        event = await ticket.next()
        if isinstance(event, Piece):
            finished = event.finish_reason is not None
            yield event


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
