"""Weights as 8-bit codes with one scale for each row, as bitsandbytes keeps them for LLM.int8().

    w ≈ q · absmax / 127,   q = round(127 · w / absmax) in [−127, 127],   absmax over the row

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022, arXiv 2208.07339.
The kernels round inputs likewise while the model runs, one scale for each token, except in columns that hold an
outlier; `rounded_inputs` is what they multiply with.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT, ABSMAX, FORMAT = "weight", "SCB", "weight_format"
STEP = 7.874015718698502e-3  # 1 / 127 as the library multiplies with it


@dataclass(frozen=True)
class Int8Rows:
    """One linear's weight as codes `[out, in]` int8 and the largest absolute weights `[out]` of its rows, float32."""

    codes: Tensor
    absmax: Tensor
    bits: int = 8

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` in float32, as the library turns it back."""
        return dequantize_rows(self.codes, self.absmax)

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """What is stored for the linear; the format's number says that rows lie one after the other."""
        return {
            f"{linear}.{WEIGHT}": self.codes,
            f"{linear}.{ABSMAX}": self.absmax,
            f"{linear}.{FORMAT}": torch.tensor(0, dtype=torch.uint8),
        }


def quantize_rows(weight: Tensor) -> Int8Rows:
    """Round `[out, in]` to the nearest codes; a row of zeros has a scale of 0.

    The library turns weights into float16 first, which loses small ones and overflows above 65504; here nothing is
    lost before the codes.

    >>> quantize_rows(torch.tensor([[0.5, -1.0, 0.25]])).codes.tolist()
    [[64, -127, 32]]
    """
    weight = weight.float()
    absmax = weight.abs().amax(dim=1)
    per_unit = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
    codes = torch.round(weight * per_unit.clamp(max=torch.finfo(torch.float32).max)[:, None]).clamp(-127, 127)
    return Int8Rows(codes.to(torch.int8), absmax)


def dequantize_rows(codes: Tensor, absmax: Tensor) -> Tensor:
    """Weights `[out, in]` in float32 of codes and their rows' largest absolute weights."""
    return codes * absmax[:, None] * STEP


def read_rows(state: Mapping[str, Tensor], linear: str) -> Tensor:
    """The weight `[out, in]` that a linear's tensors stand for, in float32."""
    return dequantize_rows(state[f"{linear}.{WEIGHT}"], state[f"{linear}.{ABSMAX}"])


def rounded_inputs(inputs: Tensor, threshold: float) -> Tensor:
    """What the kernels multiply the weights with: inputs `[…, in]` rounded token by token, outlier columns as they are.

    Args:
        inputs: all tokens of one call; a column is an outlier if it is one for any of them.
        threshold: absolute value from which an input is an outlier; 0 knows none.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    half = rows.to(torch.float16)
    outlier = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    small = half.masked_fill(outlier, 0)
    absmax = small.abs().amax(dim=1, keepdim=True).float()
    codes = torch.round(small * torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax)))
    kept = outlier.any(dim=0)
    rounded = torch.where(kept, rows.float(), codes * absmax * STEP)
    return rounded.to(inputs.dtype).reshape(inputs.shape)
