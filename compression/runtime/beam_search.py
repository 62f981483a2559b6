"""Beam search as the authors of mPLUG-2 wrote it, over any model that says how likely each next token is.

It is not the library's: scores are divided by ((5 + length) / 6)^0.6, an answer ends when its best beam does, and a
beam that has ended stays among the others until then.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -1e20


@dataclass(frozen=True)
class BeamSettings:
    """How answers are searched: token ids that begin and end one, beams, lengths in tokens, the penalty's exponent."""

    start: int
    end: int
    beams: int = 5
    shortest: int = 4
    longest: int = 20
    alpha: float = 0.6


def beam_search(step: Callable[[Tensor, Tensor], Tensor], settings: BeamSettings) -> list[tuple[float, list[int]]]:
    """Return the answers that were found with their scores, best first; each begins with `start`.

    Args:
        step: takes each beam's last token `[beams]` and which beam of the step before it grew from `[beams]`, and
            returns the logits of what follows `[beams, vocabulary]`.
        settings: see there.
    """
    beams = settings.beams
    alive, parents = torch.full((beams, 1), settings.start), torch.arange(beams)
    totals = torch.tensor([0.0] + [float("-inf")] * (beams - 1))  # all beams are the same at first
    found: list[tuple[float, list[int]]] = []
    for length in range(settings.longest):
        likely = torch.log_softmax(step(alive[:, -1], parents).float().cpu(), dim=-1)
        if length < settings.shortest:
            likely[:, settings.end] = NEVER
        penalty = ((5.0 + length + 1) / 6.0) ** settings.alpha
        scores, places = ((totals[:, None] + likely) / penalty).flatten().topk(beams)
        totals = scores * penalty
        parents, tokens = places // likely.shape[-1], places % likely.shape[-1]
        alive = torch.cat((alive[parents], tokens[:, None]), dim=1)
        ended = tokens == settings.end
        finished = bool(ended[0]) or length + 1 == settings.longest
        for beam in range(beams):
            if finished or bool(ended[beam]):
                found.append((float(scores[beam]), alive[beam].tolist()))
        if finished:
            break
    return sorted(found, key=lambda one: one[0], reverse=True)
