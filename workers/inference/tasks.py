"""What the token loop is asked for, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.inference.sampling import SamplingChoice

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationTask:
    """One prompt to be answered, once or several times.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most tokens of each answer.
        sampling: how to pick tokens.
        stops: strings before which the answer ends.
        continues_prompt: the answer carries on the prompt's text (completions), so its first space is kept.
        pictures: what the model's forward takes beside the prompt, by argument; empty without images.
        logprobs: how many likeliest tokens to list beside each token's log-probability; None computes none.
        choices: how many answers, each sampled by a seed of its own.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingChoice
    stops: tuple[str, ...]
    continues_prompt: bool
    pictures: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    choices: int = 1

    def ends_with(self, piece: "Piece") -> bool:
        """Whether nothing follows this piece."""
        return piece.finish_reason is not None and piece.index == self.choices - 1


@dataclass(frozen=True)
class Started:
    """The first event of a request that was admitted: from here on its answers are on their way, one by one."""

    prompt_tokens: int
    choices: int = 1


@dataclass(frozen=True)
class Alternative:
    """A token that could be written.

    Attributes:
        token: its text, or its name where it has none.
        logprob: its log-probability in nats, by the model alone.
        bytes: what it adds to a text.
    """

    token: str
    logprob: float
    bytes: bytes


@dataclass(frozen=True)
class ScoredToken(Alternative):
    """A token that was written; `bytes` are those that stand in the answer.

    Attributes:
        alternatives: the likeliest tokens at its place, likeliest first.
        offset: the character of the answer with which it begins.
    """

    alternatives: tuple[Alternative, ...]
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """One more token.

    Attributes:
        text: what became readable with it; may be empty.
        tokens: tokens of its answer so far, the end token included.
        finish_reason: set on the last piece of an answer alone.
        scores: the tokens whose text is out with this piece, where log-probabilities are asked for.
        index: of the answer that it belongs to.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    scores: tuple[ScoredToken, ...] = ()
    index: int = 0


Event = Started | Piece
