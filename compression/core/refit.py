"""Least squares towards a target, held near what was there: the one solve behind every correction.

    W' = argmin_W E‖a Wᵀ − t‖² + λ ‖W − W_0‖²   =>   W'ᵀ = (E[aᵀa] + λI)⁻¹ (E[aᵀt] + λ W_0ᵀ)

λ is relative to the mean diagonal of E[aᵀa]: to infinity it leaves W_0, to zero it is the plain re-fit.
"""

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
    """`E[aᵀa]` and `E[aᵀt]` over tokens: float32 products per chunk, float64 sums across chunks."""

    def __init__(self, inputs: int, targets: int) -> None:
        """Start at zero."""
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, targets, dtype=torch.float64)
        self.tokens = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add `[..., inputs]` and `[..., targets]`."""
        a, t = inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])
        self._gram += a.T @ a
        self._cross += a.T @ t
        self.tokens += len(a)

    def gram(self) -> Tensor:
        """`[inputs, inputs]`, exactly symmetric."""
        mean = self._gram / max(1, self.tokens)
        return (mean + mean.T) / 2

    def cross(self) -> Tensor:
        """`[inputs, targets]`."""
        return self._cross / max(1, self.tokens)
