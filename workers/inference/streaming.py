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
from workers.inference.tasks import Piece, Started

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
    """Return the whole answers.

    Raises:
        ModepressError: generation ended with an error.
    """
    answers: list[list[Piece]] = [[] for _ in range(started.choices)]
    async for piece in _pieces(ticket, started.choices):
        answers[piece.index].append(piece)
    usage = usage_of(started.prompt_tokens, sum(pieces[-1].tokens for pieces in answers))
    return shape.whole(answers, usage)


async def event_lines(
    ticket: Ticket, started: Started, shape: AnswerShape, *, include_usage: bool, count_tokens: bool = False
) -> AsyncIterator[str]:
    """Yield `data:` lines: roles (chat), text and finish of each answer, usage when asked for, `[DONE]`.

    An error on the way is a line with a top-level `error`, and the last one. With `count_tokens` a comment, which
    clients pass over, says before the end how many tokens were read and generated: the API counts them per owner.
    """
    extra = {"usage": None} if include_usage else {}
    if shape.kind == "chat":
        for index in range(started.choices):
            yield _line(shape.role(index) | extra)
    written = 0
    try:
        async for piece in _pieces(ticket, started.choices):
            if piece.text or piece.scores:
                yield _line(shape.text(piece) | extra)
            if piece.finish_reason is not None:
                written += piece.tokens
                yield _line(shape.finish(piece) | extra)
        if include_usage:
            yield _line(shape.usage(usage_of(started.prompt_tokens, written)))
        if count_tokens:
            yield f": tokens {started.prompt_tokens + written}\n\n"
        yield DONE
    except Exception as error:  # noqa: BLE001  (the status line is gone; the stream itself reports it)
        logger.warning("a stream of %s ended with an error: %s", shape.model, error)
        yield _line(ErrorResponse(error=error_body(error)).model_dump())


async def _pieces(ticket: Ticket, choices: int) -> AsyncIterator[Piece]:
    """Yield pieces until as many answers have ended."""
    while choices:
        event = await ticket.next()
        if isinstance(event, Piece):
            choices -= event.finish_reason is not None
            yield event


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
