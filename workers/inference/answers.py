"""OpenAI's answer objects, whole and in chunks."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from api_schemas.inference import TokenUsage
from workers.inference.tasks import FinishReason

Kind = Literal["chat", "completion"]
PREFIXES = {"chat": "chatcmpl-", "completion": "cmpl-"}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the usage object; the end token counts, as a token the model wrote."""
    total = prompt_tokens + completion_tokens
    usage = TokenUsage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)
    return usage.model_dump()


@dataclass(frozen=True)
class AnswerShape:
    """Builds the objects of one answer; all carry the same id and time, and the engine where a request names one."""

    kind: Kind
    model: str
    engine: str | None = None
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", PREFIXES[self.kind] + uuid.uuid4().hex)
        object.__setattr__(self, "created", int(time.time()))

    def whole(self, text: str, reason: FinishReason, usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer in one object."""
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._object("chat.completion", [self._choice(content, reason)]) | {"usage": usage}

    def role(self) -> dict[str, Any]:
        """Return the first chunk of a chat answer, which says who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def text(self, text: str) -> dict[str, Any]:
        """Return a chunk of text."""
        return self._chunk({"delta": {"content": text}} if self.kind == "chat" else {"text": text}, None)

    def finish(self, reason: FinishReason) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""
        return self._chunk({"delta": {}} if self.kind == "chat" else {"text": ""}, reason)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk without choices that carries the usage."""
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(self, content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [self._choice(content, reason)])

    def _choice(self, content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _object(self, chat_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = chat_name if self.kind == "chat" else "text_completion"
        said = {} if self.engine is None else {"system_fingerprint": self.engine}
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, **said, "choices": choices}
