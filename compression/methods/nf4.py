"""NF4: weights as 4-bit codes of a table made for normal distributions, a scale for each run of inputs.

Reference: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314: 4-bit
NormalFloat and double quantisation (section 3).
"""

from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.nf4 import Nf4Config
from compression.core.linear_walk import SolvedLinear
from compression.core.normal_float import quantize_normal


class Nf4:
    """The method as the walk over linears calls it."""

    stage: ClassVar[str] = "quantize"

    def __init__(self, config: Nf4Config) -> None:
        """Take the recipe's step."""
        self.config = config

    def solve(self, weight: Tensor, correlation: Tensor, dtype: torch.dtype) -> SolvedLinear:  # noqa: ARG002
        """Round one weight; its inputs play no part."""
        double = self.config.double_quantization
        dtype = torch.float32 if dtype is torch.float64 else dtype  # the library has no codes of float64
        return SolvedLinear(quantize_normal(weight, self.config.block_size, dtype, double=double))
