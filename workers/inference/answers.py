"""OpenAI's answer objects, whole and in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from api_schemas.inference import TokenUsage
from workers.inference.tasks import Alternative, Piece, ScoredToken

Kind = Literal["chat", "completion"]
PREFIXES = {"chat": "chatcmpl-", "completion": "cmpl-"}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the usage object; the end token counts, as a token the model wrote."""
    total = prompt_tokens + completion_tokens
    usage = TokenUsage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)
    return usage.model_dump()


@dataclass(frozen=True)
class AnswerShape:
    """Builds the objects of a request's answers; all carry the same id and time, and the engine where it names one.

    Where `scored`, texts come with the log-probabilities of their tokens; else `logprobs` is null.
    """

    kind: Kind
    model: str
    engine: str | None = None
    scored: bool = False
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", PREFIXES[self.kind] + uuid.uuid4().hex)
        object.__setattr__(self, "created", int(time.time()))

    def whole(self, answers: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """Return all answers, each given by its pieces, in one object."""
        choices = []
        for pieces in answers:
            text = "".join(piece.text for piece in pieces)
            content: dict[str, Any] = {"text": text}
            if self.kind == "chat":
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            scores = [score for piece in pieces for score in piece.scores]
            choices.append(_choice(content, pieces[-1], self._logprobs(scores)))
        return self._object("chat.completion", choices) | {"usage": usage}

    def role(self, index: int) -> dict[str, Any]:
        """Return the first chunk of a chat answer, which says who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, Piece("", 0, index=index))

    def text(self, piece: Piece) -> dict[str, Any]:
        """Return a chunk of text."""
        content = {"delta": {"content": piece.text}} if self.kind == "chat" else {"text": piece.text}
        return self._chunk(content, replace(piece, finish_reason=None), self._logprobs(piece.scores))

    def finish(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""
        return self._chunk({"delta": {}} if self.kind == "chat" else {"text": ""}, piece)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk without choices that carries the usage."""
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(self, content: dict[str, Any], piece: Piece, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [_choice(content, piece, logprobs)])

    def _logprobs(self, scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.scored:
            return None
        return _chat_logprobs(scores) if self.kind == "chat" else _completion_logprobs(scores)

    def _object(self, chat_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = chat_name if self.kind == "chat" else "text_completion"
        said = {} if self.engine is None else {"system_fingerprint": self.engine}
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, **said, "choices": choices}


def _choice(content: dict[str, Any], piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _chat_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any]:
    content = [
        _alternative(score) | {"top_logprobs": [_alternative(other) for other in score.alternatives]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _alternative(one: Alternative) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.bytes)}


def _completion_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any]:
    """OpenAI's older form: parallel lists; among the likeliest is always the token that was written."""
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            {score.token: score.logprob} | {other.token: other.logprob for other in reversed(score.alternatives)}
            for score in scores
        ],
        "text_offset": [score.offset for score in scores],
    }
