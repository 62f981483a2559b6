"""LLM.int8(): weights as 8-bit codes row by row; the kernels round the inputs likewise, but for outlier columns.

Reference: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022, arXiv
2208.07339: vector-wise quantisation (section 3.1), mixed-precision decomposition (section 3.2).
"""

from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.int8 import Int8Config
from compression.core.int8_rows import quantize_rows
from compression.core.linear_walk import SolvedLinear


class Int8:
    """The method as the walk over linears calls it."""

    stage: ClassVar[str] = "quantize"

    def __init__(self, config: Int8Config) -> None:
        """Take the recipe's step; the threshold is for those who run the model."""
        self.config = config

    def solve(self, weight: Tensor, correlation: Tensor, dtype: torch.dtype) -> SolvedLinear:  # noqa: ARG002
        """Round one weight; its inputs play no part."""
        return SolvedLinear(quantize_rows(weight))
