"""Weights as codes on a symmetric grid, and the codes as 32-bit words: exact in both directions.

    w ≈ scale · q,   q ∈ [−2^(bits−1), 2^(bits−1) − 1],   one scale for each row's group of adjacent inputs

Scales are rounded to the weights' own dtype before any weight is, and `dequantized` multiplies in that dtype: what a
method computes with is, to the bit, what every reader of the artifact computes. Words hold `q + 2^(bits−1)`, the first
code in the lowest bits (compressed-tensors' `pack-quantized`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


@dataclass(frozen=True)
class Quantized:
    """One linear's weight as codes `[out, in]` int8 of so many bits, and scales `[out, groups]` in storage dtype."""

    codes: Tensor
    scale: Tensor
    bits: int

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` in storage dtype."""
        return dequantize(self.codes, self.scale)

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """What is stored for the linear instead of its weight."""
        return {
            f"{linear}.{PACKED}": pack(self.codes, self.bits),
            f"{linear}.{SCALE}": self.scale,
            f"{linear}.{SHAPE}": torch.tensor(self.codes.shape, dtype=torch.int64),
        }


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid_scale(weight: Tensor, bits: int, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """Scales `[out, groups]` in `dtype` under which the largest weight of each group is half a step beyond the grid.

    Args:
        weight: `[out, in]`, float64.
        bits: of a code.
        group_size: inputs that share a scale; None is the whole row.
        dtype: in which the scales are stored.

    >>> grid_scale(torch.tensor([[1.5, -0.5]]).double(), 4, None, torch.float32).tolist()
    [[0.20000000298023224]]
    """
    grouped = weight.reshape(weight.shape[0], -1, group_size or weight.shape[1])
    steps = (2**bits - 1) / 2
    scale = (grouped.abs().amax(dim=-1) / steps).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros, or too small for the dtype


def nearest_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of the nearest grid points, int8; `scale` is broadcast against `weight`."""
    low, high = limits(bits)
    return (weight / scale.to(weight.dtype)).round().clamp(low, high).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Weights `[out, in]` of codes, in the dtype of their scales `[out, groups]`."""
    grouped = codes.reshape(*scale.shape, -1).to(scale.dtype)
    return (grouped * scale[..., None]).reshape(codes.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[out, in]` int8 as words `[out, ⌈in · bits / 32⌉]` int32.

    >>> pack(torch.tensor([[-8, -7, 7, -8, -8, -8, -8, -8]], dtype=torch.int8), 4).tolist()
    [[3856]]
    """
    per_word = WORD_BITS // bits
    unsigned = codes.to(torch.int64) - limits(bits)[0]
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word) * bits
    words = (unsigned.reshape(codes.shape[0], -1, per_word) << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The codes `[out, inputs]` int8 of packed words."""
    shifts = torch.arange(WORD_BITS // bits) * bits
    codes = (words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    return (codes.flatten(1)[:, :inputs] + limits(bits)[0]).to(torch.int8)


def read_packed(state: Mapping[str, Tensor], linear: str) -> Tensor:
    """The weight `[out, in]` that a linear's tensors stand for, in storage dtype.

    The bits follow from the words: a row fills them, which plans make sure of.
    """
    words, inputs = state[f"{linear}.{PACKED}"], int(state[f"{linear}.{SHAPE}"][1])
    return dequantize(unpack(words, words.shape[1] * WORD_BITS // inputs, inputs), state[f"{linear}.{SCALE}"])
