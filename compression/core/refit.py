"""Least squares towards a target, held near what was there: the one solve behind every correction.

    W' = argmin_W E‖a Wᵀ − t‖² + λ ‖W − W_0‖²   =>   W'ᵀ = (E[aᵀa] + λI)⁻¹ (E[aᵀt] + λ W_0ᵀ)

λ is relative to the mean diagonal of E[aᵀa]: to infinity it leaves W_0, to zero it is the plain re-fit. Calibration
text is little: an unchecked re-fit learns it by heart and forgets the language. So λ is chosen by what the solution
loses on tokens it was not fitted to, and the final solve, with that λ, uses all tokens. That loss falls and then rises
with λ (it did in each of 250 solves on SmolLM2), so the search goes downhill and stops at the first rise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compression.core.linalg import add_gram_, factorize, mirror_
from compression.core.parallel import WHOLE, Group, Share
from compression.core.timeline import span

RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
FALLBACK_RIDGE = 0.3  # where there are too few chunks to hold any out
HELD_OUT = 4  # one chunk in so many
TOO_FEW_CHUNKS = f"ridge {FALLBACK_RIDGE}, not chosen: fewer than {HELD_OUT} chunks of calibration text to hold one out"


def refit(gram: Tensor, cross: Tensor, original: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Solve for the weight.

    Args:
        gram: `[n, n]` float64, E[aᵀa] of the inputs.
        cross: `[n, d]` float64, E[aᵀt] of inputs and target.
        original: `[d, n]` float64, the weight to stay near.
        ridge: λ in units of the mean diagonal of `gram`, positive.

    Returns:
        `[d, n]` float64, and the damping its factorisation needed beside the ridge.
    """
    penalty = float(ridge * gram.diagonal().mean())
    factor = factorize(gram, "input correlation", penalty)
    return factor.solve(cross + penalty * original.T).T, factor.damping


@dataclass(frozen=True)
class Moments:
    """E[aᵀa] `[n, n]`, E[aᵀt] `[n, d]`, E[a] `[n]`, E[t] `[d]` and E‖t‖² over (weighted) tokens, all float64."""

    gram: Tensor
    cross: Tensor
    input_mean: Tensor
    target_mean: Tensor
    target_energy: float

    def mapped(self, basis: Tensor) -> "Moments":
        """The same of the inputs `a @ basis`, `[n, k]`."""
        return replace(
            self,
            gram=basis.T @ self.gram @ basis,
            cross=basis.T @ self.cross,
            input_mean=basis.T @ self.input_mean,
        )

    def selected(self, kept: Tensor) -> "Moments":
        """The same of the inputs at the places `kept` `[k]`."""
        return replace(self, gram=self.gram[kept][:, kept], cross=self.cross[kept], input_mean=self.input_mean[kept])

    def towards(self, weight: Tensor, bias: Tensor | None) -> "Moments":
        """The same with targets `t @ weightᵀ + bias`; their energy is not known and reads NaN."""
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        return replace(
            self,
            cross=self.cross @ weight.T + torch.outer(self.input_mean, shift),
            target_mean=weight @ self.target_mean + shift,
            target_energy=float("nan"),
        )

    def refit(self, weight: Tensor, bias: Tensor | None, ridge: float) -> "Refitted":
        """Weight `[d, n]` and bias `[d]` towards the targets, near `weight`; affine where there is a bias."""
        if bias is None:
            new, damping = refit(self.gram, self.cross, weight, ridge)
            return Refitted(new, None, ridge, damping)
        gram = self.gram - torch.outer(self.input_mean, self.input_mean)
        cross = self.cross - torch.outer(self.input_mean, self.target_mean)
        new, damping = refit(gram, cross, weight, ridge)
        return Refitted(new, self.target_mean - new @ self.input_mean, ridge, damping)

    def misfit(self, weight: Tensor, bias: Tensor | None) -> float:
        """E‖a Wᵀ + b − t‖² − E‖t‖²: what differs between two solutions for the same targets."""
        error = float(((weight @ self.gram) * weight).sum()) - 2 * float((weight.T * self.cross).sum())
        if bias is not None:
            error += float(bias @ bias) + 2 * float(bias @ (weight @ self.input_mean - self.target_mean))
        return error

    def relative_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """‖a Wᵀ + b − t‖ / ‖t‖ over the tokens."""
        error = max(self.target_energy + self.misfit(weight, bias), 0.0)
        return float(error / max(self.target_energy, 1e-300)) ** 0.5


@dataclass(frozen=True)
class Refitted:
    """A solved linear, the ridge it was solved with, what the solve needed, and why the ridge was not chosen, if so."""

    weight: Tensor
    bias: Tensor | None
    ridge: float
    damping: float
    fallback: str | None = None


@dataclass(frozen=True)
class Folds:
    """Moments of the tokens that candidates are fitted to, and of those that judge them (None: too few).

    `weight` is what the first are of all tokens, by weight.
    """

    fit: Moments
    held_out: Moments | None
    weight: float = 1.0

    @property
    def whole(self) -> Moments:
        """Moments of all tokens; made anew each time, for a wide MLP's take gigabytes."""
        if self.held_out is None:
            return self.fit

        def mixed(name: str) -> Any:
            return torch.lerp(getattr(self.held_out, name), getattr(self.fit, name), self.weight)

        energy = self.held_out.target_energy + self.weight * (self.fit.target_energy - self.held_out.target_energy)
        return Moments(mixed("gram"), mixed("cross"), mixed("input_mean"), mixed("target_mean"), energy)

    def mapped(self, basis: Tensor) -> "Folds":
        """Of the inputs `a @ basis`, see `Moments.mapped`."""
        return self._each(lambda moments: moments.mapped(basis))

    def selected(self, kept: Tensor) -> "Folds":
        """Of the inputs at the places `kept`."""
        return self._each(lambda moments: moments.selected(kept))

    def towards(self, weight: Tensor, bias: Tensor | None) -> "Folds":
        """With targets `t @ weightᵀ + bias`."""
        return self._each(lambda moments: moments.towards(weight, bias))

    def refit(self, weight: Tensor, bias: Tensor | None, ridge: float | None, like: Refitted | None = None) -> Refitted:
        """Re-fit near `weight` on all tokens; without a given ridge, with the one that judges best on held-out ones.

        The search starts where that of a `like` solve has ended.
        """
        if ridge is None and self.held_out is None:
            return replace(self.whole.refit(weight, bias, FALLBACK_RIDGE), fallback=TOO_FEW_CHUNKS)
        if ridge is None:
            start = like.ridge if like is not None and like.ridge in RIDGES else FALLBACK_RIDGE
            ridge = self._best_ridge(weight, bias, start)
        return self.whole.refit(weight, bias, ridge)

    def _best_ridge(self, weight: Tensor, bias: Tensor | None, start: float) -> float:
        judge = self.held_out
        assert judge is not None  # noqa: S101 (asked just before)

        @cache
        def misfit(place: int) -> float:
            candidate = self.fit.refit(weight, bias, RIDGES[place])
            return judge.misfit(candidate.weight, candidate.bias)

        place = RIDGES.index(start)
        for step in (1, -1):
            while 0 <= place + step < len(RIDGES) and misfit(place + step) < misfit(place):
                place += step
        return RIDGES[place]

    def _each(self, change: Callable[[Moments], Moments]) -> "Folds":
        return Folds(change(self.fit), None if self.held_out is None else change(self.held_out), self.weight)


class RunningCross:
    """Second moments of inputs a and targets t over tokens: float32 products per chunk, float64 sums across chunks."""

    def __init__(self, inputs: int, targets: int, share: Share = WHOLE) -> None:
        """Start at zero.

        Args:
            inputs: width of a.
            targets: width of t.
            share: which chunks this process will add; the same ones judge as in one process alone.
        """
        self._folds = (_Sums(inputs, targets), _Sums(inputs, targets))
        self._chunks, self._group = share.first_chunk, share.group

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add a chunk of `[..., inputs]` and `[..., targets]`; every `HELD_OUT`-th chunk judges.

        `weights [..., 1]` count tokens differently: a token's square error is multiplied by its weight's square.
        """
        a, t = inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])
        ones = a.new_ones(len(a), 1) if weights is None else weights.reshape(-1, 1)
        self._chunks += 1
        with span("statistics"):
            self._folds[self._chunks % HELD_OUT == 0].add(a * ones, t * ones, ones)

    def skip(self) -> None:
        """Count a chunk without tokens, as an expert may have: which chunks judge is a matter of the text alone."""
        self._chunks += 1

    def folds(self) -> Folds:
        """The moments of the chunks of all ranks; asked for once, when all are added: the sums become them."""
        fit, judge = self._folds
        for one in self._folds:
            one.sum_(self._group)
        weight = fit.mass / max(1e-300, fit.mass + judge.mass)
        return Folds(fit.moments_(), judge.moments_() if judge.mass else None, weight)


class _Sums:
    def __init__(self, inputs: int, targets: int) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)  # its upper triangle
        self.cross = torch.zeros(inputs, targets, dtype=torch.float64)
        self.input = torch.zeros(inputs, dtype=torch.float64)
        self.target = torch.zeros(targets, dtype=torch.float64)
        self.energy, self.mass = 0.0, 0.0

    def sum_(self, group: Group) -> None:
        """Become the sum over the ranks."""
        scalars = torch.tensor([self.energy, self.mass], dtype=torch.float64)
        for tensor in (self.gram, self.cross, self.input, self.target, scalars):
            group.sum_(tensor)
        self.energy, self.mass = scalars.tolist()

    def add(self, a: Tensor, t: Tensor, ones: Tensor) -> None:
        """Add rows that carry their weights already; `ones` is what a constant input became."""
        add_gram_(self.gram, a)
        self.cross += a.T @ t
        self.input += (a * ones).sum(dim=0, dtype=torch.float64)
        self.target += (t * ones).sum(dim=0, dtype=torch.float64)
        self.energy += float(t.square().sum(dtype=torch.float64))
        self.mass += float(ones.square().sum(dtype=torch.float64))

    def moments_(self) -> Moments:
        """Divide by the weight, in place: afterwards these are no sums any more."""
        mass = max(1e-300, self.mass)
        for tensor in (self.gram, self.cross, self.input, self.target):
            tensor /= mass
        return Moments(mirror_(self.gram), self.cross, self.input, self.target, self.energy / mass)
