"""Weights as 4-bit codes of a fixed table of 16 values, as bitsandbytes keeps them: NF4 of QLoRA.

    w ≈ table[q] · absmax,   absmax over each run of `block_size` adjacent inputs

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314: the table holds
quantiles of a normal distribution (appendix E); with double quantisation (section 3) the scales, less their mean, are
8-bit codes of the library's dynamic map, 256 of them to a scale of their own.

Scales are turned into what readers will have before any weight is rounded, so the nearest code is the nearest weight.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from preflight.normal_float_facts import OFFSET, facts_text

TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
WEIGHT, ABSMAX, MAP = "weight", "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
FACTS = "weight.quant_state.bitsandbytes__nf4"
NESTED_BLOCK = 256
SMALLEST = 1e-38


@dataclass(frozen=True)
class Scales:
    """Scales `[out, runs]` in float32 as readers have them, and how they are stored.

    Attributes:
        absmax: the scales.
        codes: of double quantisation, `[out · runs]` uint8; None where scales are stored as they are.
        nested_absmax: scales of these codes, `[⌈out · runs / 256⌉]`.
        nested_map: the values that codes stand for, `[256]`.
        offset: what the scales were less of.
    """

    absmax: Tensor
    codes: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class NormalFloat:
    """One linear's weight as codes `[out, in]` uint8 of the table, and scales; `dtype` is the weights' own."""

    codes: Tensor
    scales: Scales
    dtype: torch.dtype
    bits: int = 4

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` in its own dtype."""
        return dequantize_normal(self.codes, self.scales.absmax, self.dtype)

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """What is stored for the linear: two codes to a byte, the first in the high bits."""
        scales, codes = self.scales, self.codes.reshape(-1)
        stored = {
            f"{linear}.{WEIGHT}": ((codes[::2] << 4) | codes[1::2]).unsqueeze(1),
            f"{linear}.{MAP}": torch.tensor(TABLE),
            f"{linear}.{ABSMAX}": scales.absmax.reshape(-1) if scales.codes is None else scales.codes,
        }
        if scales.nested_absmax is not None and scales.nested_map is not None:
            stored[f"{linear}.{NESTED_ABSMAX}"] = scales.nested_absmax
            stored[f"{linear}.{NESTED_MAP}"] = scales.nested_map
        outputs, inputs = self.codes.shape
        offset = None if scales.codes is None else scales.offset
        block_size = inputs // scales.absmax.shape[1]
        facts = facts_text((outputs, inputs), block_size, str(self.dtype).removeprefix("torch."), offset)
        return {**stored, f"{linear}.{FACTS}": torch.tensor(list(facts.encode()), dtype=torch.uint8)}


def normal_scales(weight: Tensor, block_size: int, *, double: bool) -> Scales:
    """The largest absolute weight of each run of inputs of `[out, in]`, as readers will have it.

    Args:
        weight: its inputs are a multiple of `block_size`.
        block_size: inputs of one run.
        double: whether the scales become codes too.
    """
    absmax = weight.float().reshape(weight.shape[0], -1, block_size).abs().amax(dim=-1)
    if not double:
        return Scales(absmax)
    from bitsandbytes.functional import quantize_blockwise  # here, because importing it looks for GPUs

    mean = absmax.mean()
    codes, state = quantize_blockwise(absmax.reshape(-1) - mean, blocksize=NESTED_BLOCK)
    scales = Scales(absmax, codes, state.absmax, state.code, float(mean))
    return replace(scales, absmax=_nested(codes, state.absmax, state.code, float(mean)).reshape(absmax.shape))


def nearest_normal(weight: Tensor, absmax: Tensor) -> Tensor:
    """Codes uint8 of the nearest values of the table; `absmax` is broadcast against `weight`.

    >>> nearest_normal(torch.tensor([2.0, 0.1, -1.5]), torch.tensor(2.0)).tolist()
    [15, 8, 1]
    """
    table = torch.tensor(TABLE)
    between = (table[:-1] + table[1:]) / 2
    safe = torch.where(absmax.abs() < SMALLEST, SMALLEST, absmax)  # double quantisation can turn small ones negative
    units = (weight.float() * (1.0 / safe)).clamp(-1, 1)
    return torch.bucketize(units, between, out_int32=True).to(torch.uint8)


def quantize_normal(weight: Tensor, block_size: int, dtype: torch.dtype, *, double: bool) -> NormalFloat:
    """Round `[out, in]` to the nearest codes; `dtype` is that of the weights readers will compute with."""
    scales = normal_scales(weight, block_size, double=double)
    grouped = weight.reshape(*scales.absmax.shape, block_size)
    return NormalFloat(nearest_normal(grouped, scales.absmax[..., None]).reshape(weight.shape), scales, dtype)


def dequantize_normal(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights `[out, in]` of codes and scales `[out, runs]`: multiplied in float32, then rounded to `dtype`."""
    values = torch.tensor(TABLE)[codes.long()].reshape(*absmax.shape, -1)
    return (values * absmax[..., None]).reshape(codes.shape).to(dtype)


def read_normal(state: Mapping[str, Tensor], linear: str) -> Tensor:
    """The weight `[out, in]` that a linear's tensors stand for, in its own dtype."""
    facts = read_facts(state[f"{linear}.{FACTS}"])
    bytes_ = state[f"{linear}.{WEIGHT}"].reshape(-1)
    codes = torch.stack([bytes_ >> 4, bytes_ & 0xF], dim=-1).reshape(facts["shape"])
    absmax = state[f"{linear}.{ABSMAX}"]
    if OFFSET in facts:
        absmax = _nested(absmax, state[f"{linear}.{NESTED_ABSMAX}"], state[f"{linear}.{NESTED_MAP}"], facts[OFFSET])
    return dequantize_normal(codes, absmax.reshape(len(codes), -1), getattr(torch, facts["dtype"]))


def read_facts(stored: Tensor) -> dict[str, Any]:
    """What the library keeps as text: shape, block size, dtype."""
    facts: dict[str, Any] = json.loads(bytes(stored.tolist()).decode())
    return facts


def joined_facts(parts: list[Tensor]) -> Tensor:
    """The facts of a linear that holds the rows of several."""
    read = [read_facts(part) for part in parts]
    rows = sum(facts["shape"][0] for facts in read)
    first = read[0]
    text = facts_text((rows, first["shape"][1]), first["blocksize"], first["dtype"], None)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _nested(codes: Tensor, absmax: Tensor, values: Tensor, offset: float) -> Tensor:
    """Scales of double quantisation, flat, in float32."""
    each = absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return values[codes.reshape(-1).long()] * each + torch.tensor(offset)
