"""Dense factorisations in float64 that say how much damping they needed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from api_schemas.errors import JobFailed

DAMPINGS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
SMALLEST_PIVOT = 1e-13  # of the largest diagonal entry: below it the factor is rounding noise
COLUMNS = 1024  # of an inverse or a product held at once: a wide MLP's matrices take a gigabyte each
PANEL = 256  # columns of a Gram matrix made at once: few enough to skip most of the lower triangle, enough for BLAS-3


@dataclass(frozen=True)
class Factor:
    """A lower Cholesky factor of `A + added · I`, where `added` is `damping · mean(diag A)`."""

    lower: Tensor
    damping: float
    added: float

    def solve(self, B: Tensor) -> Tensor:
        """Solve against `[n, k]` right-hand sides."""
        return torch.cholesky_solve(B, self.lower)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal `[n]` of the inverse: squared column norms of the inverse factor, a slice of columns at a time."""
        count = len(self.lower)
        diagonal = self.lower.new_empty(count)
        for start in range(0, count, COLUMNS):  # above row `start` these columns of a triangular inverse are zero
            below = self.lower[start:, start:]
            columns = torch.eye(count - start, min(COLUMNS, count - start), dtype=below.dtype, device=below.device)
            inverse = torch.linalg.solve_triangular(below, columns, upper=False)
            diagonal[start : start + COLUMNS] = inverse.square().sum(dim=0)
        return diagonal


def factorize(A: Tensor, name: str, ridge: float = 0.0) -> Factor:
    """Cholesky-factorise a symmetric positive semi-definite `[n, n]`, damping it as little as works.

    Nothing of A's size is held beside A and the factor: the diagonal is changed in place and put back.

    Args:
        A: float64, symmetric.
        name: what it is, for the error.
        ridge: added to the diagonal before any damping, in A's units; the factor is of `A + ridge · I`, damped.

    Raises:
        JobFailed: `not_finite` when A holds NaN or infinity, `not_positive` when no damping helps.
    """
    if not all_finite(A):
        raise JobFailed("not_finite", f"{name} holds NaN or infinity; the model's activations overflow on this text")
    original = A.diagonal().clone()
    diagonal = original + ridge
    scale = diagonal.mean().clamp_min(torch.finfo(A.dtype).tiny)
    try:
        for damping in DAMPINGS:
            A.diagonal().copy_(diagonal + damping * scale)
            lower, info = torch.linalg.cholesky_ex(A)
            if int(info) == 0 and float(lower.diagonal().square().min()) > SMALLEST_PIVOT * float(diagonal.max()):
                return Factor(lower, damping, damping * float(scale))
            del lower
    finally:
        A.diagonal().copy_(original)
    raise JobFailed("not_positive", f"{name} is not positive definite even when damped by {DAMPINGS[-1]}")


def all_finite(A: Tensor) -> bool:
    """Whether no entry is NaN or infinite; unlike `torch.isfinite` it needs no copy of a large A."""
    return A.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(A))


def energy(D: Tensor, C: Tensor) -> Tensor:
    """`tr(D C Dᵀ)` of `[d, n]` and a symmetric `[n, n]`, from the upper triangle of C."""
    total = D.new_zeros(())
    for start in range(0, len(C), COLUMNS):
        rows = slice(start, start + COLUMNS)
        product = D[:, rows] @ C[rows, start:]
        product[:, COLUMNS:] *= 2  # the blocks right of the diagonal stand for their mirror images too
        total += torch.sum(product * D[:, start:])
    return total


def add_gram_(upper: Tensor, rows: Tensor) -> None:
    """Add `rowsᵀ rows` to the upper triangle of `[n, n]`, in `upper`'s dtype; the rest of it is left undefined.

    The products are in the dtype of `rows [tokens, n]`. About half the operations of the whole product, and never a
    second `[n, n]`.
    """
    for start in range(0, len(upper), PANEL):
        columns = slice(start, start + PANEL)
        upper[columns, start:] += rows[:, columns].T @ rows[:, start:]


def mirror_(upper: Tensor) -> Tensor:
    """Copy the upper triangle of a square matrix over its lower one, in place, block by block."""
    for start in range(0, len(upper), COLUMNS):
        rows = slice(start, start + COLUMNS)
        block = upper[rows, rows]
        block.copy_(block.triu() + block.triu(1).T)
        upper[start + COLUMNS :, rows] = upper[rows, start + COLUMNS :].T
    return upper
