"""Least squares towards a target, held near what was there: the one solve behind every correction.

    W' = argmin_W E‖a Wᵀ − t‖² + λ ‖W − W_0‖²   =>   W'ᵀ = (E[aᵀa] + λI)⁻¹ (E[aᵀt] + λ W_0ᵀ)

λ is relative to the mean diagonal of E[aᵀa]: to infinity it leaves W_0, to zero it is the plain re-fit.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression.core.linalg import factorize


def refit(gram: Tensor, cross: Tensor, original: Tensor, ridge: float) -> Tensor:
    """Solve for the weight.

    Args:
        gram: `[n, n]` float64, E[aᵀa] of the inputs.
        cross: `[n, d]` float64, E[aᵀt] of inputs and target.
        original: `[d, n]` float64, the weight to stay near.
        ridge: λ in units of the mean diagonal of `gram`, positive.

    Returns:
        `[d, n]` float64.
    """
    penalty = ridge * gram.diagonal().mean()
    damped = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return factorize(damped, "input correlation").solve(cross + penalty * original.T).T


class RunningCross:
    """Second moments of inputs a and targets t over tokens: float32 products per chunk, float64 sums across chunks."""

    def __init__(self, inputs: int, targets: int) -> None:
        """Start at zero."""
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, targets, dtype=torch.float64)
        self._input, self._target = torch.zeros(inputs, dtype=torch.float64), torch.zeros(targets, dtype=torch.float64)
        self._energy = 0.0
        self.tokens = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add `[..., inputs]` and `[..., targets]`."""
        a, t = inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])
        self._gram += a.T @ a
        self._cross += a.T @ t
        self._input += a.sum(dim=0, dtype=torch.float64)
        self._target += t.sum(dim=0, dtype=torch.float64)
        self._energy += float(t.square().sum(dtype=torch.float64))
        self.tokens += len(a)

    def moments(self) -> "Moments":
        """The means so far."""
        count = max(1, self.tokens)
        gram = self._gram / count
        return Moments(
            gram=(gram + gram.T) / 2,
            cross=self._cross / count,
            input_mean=self._input / count,
            target_mean=self._target / count,
            target_energy=self._energy / count,
        )


@dataclass(frozen=True)
class Moments:
    """E[aᵀa] `[n, n]`, E[aᵀt] `[n, d]`, E[a] `[n]`, E[t] `[d]` and E‖t‖², all float64."""

    gram: Tensor
    cross: Tensor
    input_mean: Tensor
    target_mean: Tensor
    target_energy: float

    def mapped(self, basis: Tensor) -> "Moments":
        """The same of the inputs `a @ basis`, `[n, k]`; a selection of columns is a mapping too."""
        return replace(
            self,
            gram=basis.T @ self.gram @ basis,
            cross=basis.T @ self.cross,
            input_mean=basis.T @ self.input_mean,
        )

    def selected(self, kept: Tensor) -> "Moments":
        """The same of the inputs at the places `kept` `[k]`."""
        return replace(self, gram=self.gram[kept][:, kept], cross=self.cross[kept], input_mean=self.input_mean[kept])

    def refit(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Weight `[d, n]` and bias `[d]` towards the targets, near `weight`; affine where there is a bias."""
        if bias is None:
            return refit(self.gram, self.cross, weight, ridge), None
        gram = self.gram - torch.outer(self.input_mean, self.input_mean)
        cross = self.cross - torch.outer(self.input_mean, self.target_mean)
        new = refit(gram, cross, weight, ridge)
        return new, self.target_mean - new @ self.input_mean

    def correct_input(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """With targets that are another stream's inputs x to the same linear: say of a what the linear says of x.

        Minimises E‖a W'ᵀ + b' − (x Wᵀ + b)‖² near W; the shift is only there where the linear has a bias.
        """
        if bias is None:
            return refit(self.gram, self.cross @ weight.T, weight, ridge), None
        gram = self.gram - torch.outer(self.input_mean, self.input_mean)
        cross = self.cross - torch.outer(self.input_mean, self.target_mean)
        new = refit(gram, cross @ weight.T, weight, ridge)
        return new, bias + weight @ self.target_mean - new @ self.input_mean

    def relative_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """‖a Wᵀ + b − t‖ / ‖t‖ over the tokens."""
        error = self.target_energy - 2 * float((weight.T * self.cross).sum())
        error += float(((weight @ self.gram) * weight).sum())
        if bias is not None:
            error += float(bias @ bias) + 2 * float(bias @ (weight @ self.input_mean - self.target_mean))
        return float(max(error, 0.0) / max(self.target_energy, 1e-300)) ** 0.5
