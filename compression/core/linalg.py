"""Dense factorisations in float64 that say how much damping they needed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from api_schemas.errors import JobFailed

DAMPINGS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
SMALLEST_PIVOT = 1e-13  # of the largest diagonal entry: below it the factor is rounding noise


@dataclass(frozen=True)
class Factor:
    """A lower Cholesky factor of `A + damping · mean(diag A) · I`."""

    lower: Tensor
    damping: float

    def solve(self, B: Tensor) -> Tensor:
        """Solve against `[n, k]` right-hand sides."""
        return torch.cholesky_solve(B, self.lower)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal `[n]` of the inverse: squared column norms of the inverse factor."""
        identity = torch.eye(self.lower.shape[0], dtype=self.lower.dtype, device=self.lower.device)
        inverse = torch.linalg.solve_triangular(self.lower, identity, upper=False)
        return inverse.square().sum(dim=0)


def factorize(A: Tensor, name: str) -> Factor:
    """Cholesky-factorise a symmetric positive semi-definite `[n, n]`, damping it as little as works.

    Args:
        A: float64, symmetric.
        name: what it is, for the error.

    Raises:
        JobFailed: `not_finite` when A holds NaN or infinity, `not_positive` when no damping helps.
    """
    if not bool(torch.isfinite(A).all()):
        raise JobFailed("not_finite", f"{name} holds NaN or infinity; the model's activations overflow on this text")
    diagonal = A.diagonal()
    scale = diagonal.mean().clamp_min(torch.finfo(A.dtype).tiny)
    for damping in DAMPINGS:
        damped = A if damping == 0.0 else A + damping * scale * torch.eye(len(A), dtype=A.dtype, device=A.device)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and float(lower.diagonal().square().min()) > SMALLEST_PIVOT * float(diagonal.max()):
            return Factor(lower, damping)
    raise JobFailed("not_positive", f"{name} is not positive definite even when damped by {DAMPINGS[-1]}")
