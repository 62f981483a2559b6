"""What the token loop is asked for, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.inference.sampling import SamplingChoice

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationTask:
    """One answer to be generated.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most tokens of the answer.
        sampling: how to pick tokens.
        stops: strings before which the answer ends.
        continues_prompt: the answer carries on the prompt's text (completions), so its first space is kept.
        pictures: what the model's forward takes beside the prompt, by argument; empty without images.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingChoice
    stops: tuple[str, ...]
    continues_prompt: bool
    pictures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The first event of a request that was admitted: from here on the answer is on its way."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """One more token.

    Attributes:
        text: what became readable with it; may be empty.
        tokens: tokens of the answer so far, the end token included.
        finish_reason: set on the last piece alone.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None


Event = Started | Piece
