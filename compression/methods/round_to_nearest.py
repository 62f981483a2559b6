"""Rounding to nearest: each weight alone becomes the nearest point of its grid. The baseline of every other method."""

from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.round_to_nearest import RoundToNearestConfig
from compression.core.grid import Quantized, grid_scale, nearest_codes
from compression.core.linear_walk import SolvedLinear


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None, dtype: torch.dtype) -> Quantized:
    """Quantise `[out, in]` float64 with scales in `dtype`.

    >>> round_to_nearest(torch.tensor([[0.9, -0.2, 0.1, 1.5]]).double(), 4, None, torch.float32).codes.tolist()
    [[4, -1, 0, 7]]
    """
    scale = grid_scale(weight, bits, group_size, dtype)
    grouped = weight.reshape(*scale.shape, -1)
    return Quantized(nearest_codes(grouped, scale[..., None], bits).reshape(weight.shape), scale, bits)


class RoundToNearest:
    """The method as the walk over linears calls it."""

    stage: ClassVar[str] = "quantize"

    def __init__(self, config: RoundToNearestConfig) -> None:
        """Take the recipe's step."""
        self.config = config

    def solve(self, weight: Tensor, correlation: Tensor, dtype: torch.dtype) -> SolvedLinear:  # noqa: ARG002
        """Round one weight; its inputs play no part."""
        return SolvedLinear(round_to_nearest(weight, self.config.bits, self.config.group_size, dtype))
