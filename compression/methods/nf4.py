"""NF4: weights as 4-bit codes of a table made for normal distributions, a scale for each run of inputs.

Reference: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314: 4-bit
NormalFloat and double quantisation (section 3). With `error_correction`, GPTQ's columns (arXiv 2210.17323, Algorithm 1)
on NF4's table: scales are fixed before the first column is rounded, and later columns make up for earlier ones' errors.
"""

from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.nf4 import Nf4Config
from compression.core.linear_walk import SolvedLinear
from compression.core.normal_float import (
    NormalFloat,
    dequantize_normal,
    nearest_normal,
    normal_scales,
    quantize_normal,
)
from compression.methods.gptq import inverse_factor, round_columns, said_of, with_dead_columns_apart


class Nf4:
    """The method as the walk over linears calls it."""

    stage: ClassVar[str] = "quantize"

    def __init__(self, config: Nf4Config) -> None:
        """Take the recipe's step."""
        self.config = config

    def solve(self, weight: Tensor, correlation: Tensor, dtype: torch.dtype) -> SolvedLinear:
        """Round one weight; without error correction its inputs play no part."""
        dtype = torch.float32 if dtype is torch.float64 else dtype  # the library has no codes of float64
        if self.config.error_correction:
            return corrected_nf4(weight, correlation, self.config, dtype)
        double = self.config.double_quantization
        return SolvedLinear(quantize_normal(weight, self.config.block_size, dtype, double=double))


def corrected_nf4(W: Tensor, H: Tensor, config: Nf4Config, dtype: torch.dtype) -> SolvedLinear:
    """Round a weight to NF4's table so that its outputs, not its entries, stay near.

    Args:
        W: `[out, in]` float64.
        H: `[in, in]` float64 correlation of its inputs; zero where an input never fires.
        config: run length, double quantisation, damping.
        dtype: in which readers compute weights.
    """
    scales = normal_scales(W, config.block_size, double=config.double_quantization)
    H, dead = with_dead_columns_apart(H)
    order = torch.argsort(H.diagonal().masked_fill(dead, 0.0), descending=True, stable=True)
    factor = inverse_factor(H[order][:, order], config.damping_fraction)
    codes = torch.empty(W.shape, dtype=torch.uint8)

    def round_column(column: int, values: Tensor) -> Tensor:
        absmax = scales.absmax[:, column // config.block_size]
        codes[:, column] = nearest_normal(values, absmax)
        return dequantize_normal(codes[:, column, None], absmax[:, None], dtype)[:, 0].double()

    round_columns(W, factor.upper, order, round_column)
    return SolvedLinear(NormalFloat(codes, scales, dtype), factor.damping, said_of(dead))
