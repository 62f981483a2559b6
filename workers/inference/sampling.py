"""From logits to the next token.

Each value comes from the request, else from the model's generation_config.json, else it is OpenAI's default (1.0).
OpenAI's requests have no place for `top_k` and `repetition_penalty`: there the model's configuration speaks alone.
"""

import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from api_schemas.inference import Sampling


class SamplingDefaults(BaseModel):
    """What a model's generation_config.json says about sampling; None where it is silent."""

    model_config = ConfigDict(frozen=True)

    temperature: Annotated[float | None, Field(ge=0)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0)] = None


@dataclass(frozen=True)
class SamplingChoice:
    """The values one answer is sampled with.

    Attributes:
        temperature: 0 takes the likeliest token, always.
        top_p: the smallest set of likeliest tokens whose probabilities reach this sum may be drawn.
        top_k: how many likeliest tokens may be drawn; 0 sets no limit.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred already.
        seed: of the generator; the same seed, request and model give the same answer on the same machine.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


def choose_sampling(request: Sampling, defaults: SamplingDefaults) -> SamplingChoice:
    """Return the request's values, the model's where it gives none, OpenAI's where neither does."""
    return SamplingChoice(
        temperature=_first(request.temperature, defaults.temperature, 1.0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=defaults.top_k or 0,
        repetition_penalty=_first(defaults.repetition_penalty, None, 1.0),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
    )


def of_choice(sampling: SamplingChoice, index: int) -> SamplingChoice:
    """Return how the answer of this index is sampled: the first by the seed itself, others by seeds derived from it.

    A derived seed depends on seed and index alone, so asking for more answers leaves the first ones as they were.
    """
    if index == 0:
        return sampling
    digest = hashlib.sha256(f"{sampling.seed}:{index}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:8]) >> 1)  # 63 bits, as drawn seeds have


def _first(given: float | None, configured: float | None, default: float) -> float:
    if given is not None:
        return given
    return default if configured is None else configured


def kept_probabilities(logits: torch.Tensor, choice: SamplingChoice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that may be drawn and their probabilities before renormalization, likeliest first.

    Args:
        logits: [vocabulary], any float dtype.
        choice: temperature above 0, top_p and top_k are used.

    Returns:
        Token ids [kept] and float64 probabilities [kept].
    """
    probabilities = torch.softmax(logits.double() / choice.temperature, dim=-1)
    ranked, tokens = torch.sort(probabilities, descending=True, stable=True)
    if choice.top_k:
        ranked = ranked[: choice.top_k]
        ranked = ranked / ranked.sum()
    before = torch.cumsum(ranked, dim=-1) - ranked
    kept = max(1, int((before < choice.top_p).sum()))
    return tokens[:kept], ranked[:kept]


class Sampler:
    """Picks tokens for one answer with a generator of its own: no other random state is read or moved."""

    def __init__(self, choice: SamplingChoice, prompt: list[int], vocabulary: int) -> None:
        self._choice = choice
        self._generator = torch.Generator().manual_seed(choice.seed)
        self._seen = torch.zeros(vocabulary, dtype=torch.bool)
        self._seen[[token for token in prompt if token >= 0]] = True  # below 0 are positions that a table fills

    def pick(self, logits: torch.Tensor) -> int:
        """Return the next token for logits of shape [vocabulary]."""
        logits = self._penalized(logits.float().cpu())
        token = int(logits.argmax()) if self._choice.temperature == 0 else self._draw(logits)
        self._seen[token] = True
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        tokens, probabilities = kept_probabilities(logits, self._choice)
        cumulative = torch.cumsum(probabilities, dim=-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, point, right=True))
        return int(tokens[min(index, len(tokens) - 1)])

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        penalty = self._choice.repetition_penalty
        if penalty == 1.0:
            return logits
        penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._seen[: len(logits)], penalized, logits)
