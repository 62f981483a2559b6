"""GPTQ: weights are rounded column by column, and each column's error is made up for by the columns after it.

Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, arXiv 2210.17323: Algorithm 1, with its lazy batch of updates and its Cholesky form (sec. 3.3, steps 2 and 3).

Notation:
    W  `[out, in]`   weight
    H  `[in, in]`    E[x xᵀ] of its inputs, damped (the paper's 2XXᵀ: a factor changes nothing)
    U  `[in, in]`    upper Cholesky factor of H⁻¹: row j holds what column j's error costs and who can make up for it

Where this differs from the paper's code, and why:
    the grid of every group is fixed before the first column is rounded, so that the result does not depend on how many
    columns a lazy batch holds (theirs reads columns that a batch has not corrected yet);
    a column whose input never fires is rounded to nearest instead of set to zero: other text may reach it;
    the column order is by H's diagonal (`activation_order`), while groups stay runs of adjacent columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.gptq import GptqConfig
from compression.core.grid import Quantized, grid_scale, nearest_codes
from compression.core.linalg import factorize
from compression.core.linear_walk import SolvedLinear

COLUMN_BLOCK_SIZE = 128  # columns per lazy batch of updates: a matter of speed, not of the result


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor of a damped Hessian's inverse, and the damping in units of its mean diagonal."""

    upper: Tensor
    damping: float


def inverse_factor(H: Tensor, damping_fraction: float) -> InverseFactor:
    """The factor U of `(H + damping_fraction · mean(diag H) · I)⁻¹ = UᵀU`.

    Args:
        H: `[in, in]` float64, symmetric positive semi-definite.
        damping_fraction: in units of the mean diagonal; more is added only where the factorisation needs it.

    >>> inverse_factor(torch.diag(torch.tensor([3.0, 1.0]).double()), 0.5).upper
    tensor([[0.5000, 0.0000],
            [0.0000, 0.7071]], dtype=torch.float64)
    """
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    damped = factorize(H + damping_fraction * H.diagonal().mean() * identity, "Hessian")
    inverse = damped.solve(identity)
    upper = factorize((inverse + inverse.T) / 2, "inverse Hessian").lower.T
    return InverseFactor(upper, damping_fraction + damped.damping)


def gptq(
    W: Tensor,
    H: Tensor,
    config: GptqConfig,
    dtype: torch.dtype,
    *,
    column_block_size: int = COLUMN_BLOCK_SIZE,
) -> SolvedLinear:
    """Quantise a weight so that its outputs, not its entries, stay near (Algorithm 1).

    Args:
        W: `[out, in]` float64.
        H: `[in, in]` float64 correlation of its inputs; zero where an input never fires.
        config: bits, groups, order, damping.
        dtype: in which scales are stored and weights computed.
        column_block_size: columns per lazy batch of updates; changes no result.

    Returns:
        Codes and scales in the columns' own order, the damping, and a word on columns that were rounded to nearest.
    """
    scale = grid_scale(W, config.bits, config.group_size, dtype)
    width = W.shape[1] // scale.shape[1]
    H, dead = with_dead_columns_apart(H)
    order = torch.arange(len(H))
    if config.activation_order:
        order = torch.argsort(H.diagonal().masked_fill(dead, 0.0), descending=True, stable=True)
    factor = inverse_factor(H[order][:, order], config.damping_fraction)
    codes = torch.empty(W.shape, dtype=torch.int8)

    def round_column(column: int, values: Tensor) -> Tensor:
        s = scale[:, column // width]
        codes[:, column] = nearest_codes(values, s, config.bits)
        return (codes[:, column].to(dtype) * s).double()

    round_columns(W, factor.upper, order, round_column, column_block_size)
    return SolvedLinear(Quantized(codes, scale, config.bits), factor.damping, said_of(dead))


def round_columns(
    W: Tensor,
    upper: Tensor,
    order: Tensor,
    round_column: Callable[[int, Tensor], Tensor],
    column_block_size: int = COLUMN_BLOCK_SIZE,
) -> None:
    """Round a weight column by column; each column's error is made up for by those after it (Algorithm 1).

    Args:
        W: `[out, in]` float64; left alone.
        upper: factor U of the inverse Hessian, in `order`.
        order: of the columns.
        round_column: takes a column's number and values, keeps its code, and returns the values that it stands for.
        column_block_size: columns per lazy batch of updates; changes no result.
    """
    W = W[:, order].clone()
    for start in range(0, W.shape[1], column_block_size):
        end = min(start + column_block_size, W.shape[1])
        errors = torch.empty(len(W), end - start, dtype=W.dtype)
        for column in range(start, end):
            plain = round_column(int(order[column]), W[:, column])
            error = (W[:, column] - plain) / upper[column, column]
            W[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
            errors[:, column - start] = error
        W[:, end:] -= errors @ upper[start:end, end:]


def with_dead_columns_apart(H: Tensor) -> tuple[Tensor, Tensor]:
    """Give inputs that never fire a diagonal: being alone in their rows and columns, they change nothing else.

    Returns:
        The Hessian and the mask of these inputs.
    """
    dead = H.diagonal() == 0
    alive = H.diagonal()[~dead]
    H = H.clone()
    H.diagonal()[dead] = alive.mean() if len(alive) else 1.0
    return H, dead


def said_of(dead: Tensor) -> str | None:
    if not bool(dead.any()):
        return None
    if bool(dead.all()):
        return "no calibration token reached it: rounded to nearest"
    return "some inputs are zero on every calibration token: their columns are rounded to nearest"


class Gptq:
    """The method as the walk over linears calls it."""

    stage: ClassVar[str] = "quantize"

    def __init__(self, config: GptqConfig) -> None:
        """Take the recipe's step."""
        self.config = config

    def solve(self, weight: Tensor, correlation: Tensor, dtype: torch.dtype) -> SolvedLinear:
        """Quantise one weight."""
        return gptq(weight, correlation, self.config, dtype)
