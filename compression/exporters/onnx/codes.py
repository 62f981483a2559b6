"""How a linear's weight is held in the graph, and which operator multiplies by it.

    float32   MatMul                  W [in, out]
    dynamic   DynamicQuantizeMatMul   int8 codes with one scale per output (or one for all); the inputs become 8-bit
                                      codes at run time, with one scale for the whole tensor
    blocks    MatMulNBits             4- or 8-bit codes with one scale (and, of 4 bits, one offset) for `block` adjacent
                                      inputs of an output; the kernel holds inputs in 8 bits per block (accuracy_level)

The last two are operators of onnxruntime, domain com.microsoft. An embedding in blocks is read by GatherBlockQuantized,
and a head that is tied to it multiplies by the very same codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compression.exporters.onnx.trace import GraphBuilder

MICROSOFT = "com.microsoft"
ACCURACY_LEVEL = 4  # of MatMulNBits: inputs as 8-bit codes per block, products in integers
EIGHT_BIT_MIDDLE = 128

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Coding:
    """How one weight is held.

    Attributes:
        kind: which of the three ways.
        bits: of a code; 32 for float32.
        block: inputs that share a scale, where they come in blocks.
        per_channel: whether each output has a scale, where inputs are coded at run time.
    """

    kind: Literal["float32", "dynamic", "blocks"]
    bits: int = 32
    block: int = 32
    per_channel: bool = True

    @property
    def name(self) -> str:
        """In words, for the report."""
        if self.kind == "float32":
            return "float32"
        if self.kind == "dynamic":
            return "int8, inputs coded at run time" + (", one scale per output" if self.per_channel else "")
        return f"{self.bits}-bit weights, one scale per {self.block}"


FLOAT32 = Coding("float32")


@dataclass(frozen=True)
class Codes:
    """A weight `[out, in]` as codes.

    Attributes:
        values: uint8 `[out, blocks, block]` (two 4-bit codes in a byte: `block / 2`), or int8 `[out, in]`.
        scales: float32 `[out, blocks]`, or `[out]`, or `[1]`.
        offsets: of 4-bit codes, packed like them, uint8 `[out, ⌈blocks / 2⌉]`; None is the middle of the codes.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None


def dynamic_codes(weight: Tensor, *, per_channel: bool) -> Codes:
    """Symmetric int8 codes, −127 … 127, of a weight `[out, in]`."""
    largest = weight.abs().amax(dim=1) if per_channel else weight.abs().amax()[None]
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    values = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Codes(values, scales)


def block_codes(weight: Tensor, bits: int, block: int) -> Codes:
    """Codes of a weight `[out, in]` in blocks: 8 bits symmetric, 4 bits with an offset per block.

    A row that is no multiple of `block` is filled up with zeros, which are codes of zero.
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block))
    grouped = padded.reshape(weight.shape[0], -1, block)
    if bits == 8:
        largest = grouped.abs().amax(dim=-1)
        scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        values = (grouped / scales[..., None]).round().clamp(-127, 127) + EIGHT_BIT_MIDDLE
        return Codes(values.to(torch.uint8), scales)
    values, scales, offsets = _four_bits(grouped)
    return Codes(_pair(values), scales, _pair(offsets))


def _four_bits(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes whose 16 steps span each block and zero: codes, scales, offsets."""
    low, high = grouped.amin(dim=-1).clamp_max(0), grouped.amax(dim=-1).clamp_min(0)
    scales = (high - low) / 15
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    offsets = (-low / scales).round().clamp(0, 15)
    values = ((grouped / scales[..., None]).round() + offsets[..., None]).clamp(0, 15)
    return values.to(torch.uint8), scales, offsets.to(torch.uint8)


def _pair(codes: Tensor) -> Tensor:
    """Two 4-bit codes of the last axis in a byte, the first in the low half."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


def decoded(codes: Codes, coding: Coding, inputs: int) -> Tensor:
    """The weight `[out, inputs]` float32 that an operator multiplies by."""
    if coding.kind == "dynamic":
        return codes.values.float() * codes.scales[:, None]
    values = codes.values
    middle: Tensor | float = EIGHT_BIT_MIDDLE
    if coding.bits == 4:
        values = _unpaired(values)
        assert codes.offsets is not None  # noqa: S101 (4-bit codes have them)
        middle = _unpaired(codes.offsets)[:, : codes.scales.shape[1], None].float()
    return ((values.float() - middle) * codes.scales[..., None]).flatten(1)[:, :inputs]


def _unpaired(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode(weight: Tensor, coding: Coding) -> Codes:
    """Codes of a weight `[out, in]`, float32."""
    if coding.kind == "dynamic":
        return dynamic_codes(weight, per_channel=coding.per_channel)
    return block_codes(weight, coding.bits, coding.block)


def stored_bytes(shape: Sequence[int], coding: Coding) -> int:
    """Bytes of a weight `[out, in]` with its scales and offsets."""
    rows, inputs = shape
    if coding.kind == "float32":
        return rows * inputs * 4
    if coding.kind == "dynamic":
        return rows * inputs + (rows if coding.per_channel else 1) * 4
    blocks = -(-inputs // coding.block)
    return rows * (
        blocks * coding.block * coding.bits // 8 + blocks * 4 + ((blocks + 1) // 2 if coding.bits == 4 else 0)
    )


def lazy(read: Callable[[], Tensor], dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.LazyTensor:
    """A tensor of the graph that is computed when it is written, and not kept."""

    def evaluate() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(read().numpy()), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def product(
    builder: GraphBuilder, left: ir.Value, output: str, linear: str, shape: Sequence[int], read: Read, coding: Coding
) -> ir.Value:
    """Append `left · Wᵀ`.

    Args:
        builder: the graph.
        left: `[batch, tokens, in]`.
        output: name of the result.
        linear: the module's name, under which its tensors are stored; the same name twice is the same weight.
        shape: `[out, in]`.
        read: the weight, float32 `[out, in]`.
        coding: how it is held.
    """
    rows, inputs = shape
    if coding.kind == "float32":
        turned = lazy(lambda: read().t(), ir.DataType.FLOAT, (inputs, rows), f"{linear}.weight")
        return builder.node("MatMul", [left, builder.tensor(f"{linear}.weight", turned)], output)
    tensors = coded_tensors(builder, linear, shape, read, coding)
    if coding.kind == "dynamic":
        return builder.node("DynamicQuantizeMatMul", [left, *tensors], output, MICROSOFT)
    sizes = {"K": inputs, "N": rows, "bits": coding.bits, "block_size": coding.block}
    scales = builder.node("Reshape", [tensors[1], shape_of(builder, (rows, -1))], f"{output}/scales")
    return builder.node(
        "MatMulNBits",
        [left, tensors[0], scales, *tensors[2:]],
        output,
        MICROSOFT,
        **sizes,
        accuracy_level=ACCURACY_LEVEL,
    )


def embedding(
    builder: GraphBuilder, ids: ir.Value, output: str, table: str, shape: Sequence[int], read: Read, coding: Coding
) -> ir.Value:
    """Append the rows of a table `[rows, width]` by their numbers; its tensors are those of `product` by the same name.

    Only `float32` and 8-bit `blocks` are read so.
    """
    width = shape[1]
    if coding.kind == "float32":
        stored = lazy(read, ir.DataType.FLOAT, shape, f"{table}.weight")
        return builder.node("Gather", [builder.tensor(f"{table}.weight", stored), ids], output)
    values, scales = coded_tensors(builder, table, shape, read, coding)
    sizes = {"bits": 8, "block_size": coding.block, "gather_axis": 0, "quantize_axis": 2}
    read_rows = builder.node("GatherBlockQuantized", [values, ids, scales], f"{output}/blocks", MICROSOFT, **sizes)
    whole = builder.node("Reshape", [read_rows, shape_of(builder, (0, 0, -1))], f"{output}/rows")
    if width % coding.block == 0:
        return whole
    cut = [shape_of(builder, (number,)) for number in (0, width, 2)]
    return builder.node("Slice", [whole, *cut], output)


def coded_tensors(
    builder: GraphBuilder, linear: str, shape: Sequence[int], read: Read, coding: Coding
) -> list[ir.Value]:
    """Codes, scales and, of 4 bits, offsets as tensors of the graph."""
    rows, inputs = shape
    blocks = -(-inputs // coding.block)
    if coding.kind == "dynamic":
        size = (inputs, rows), (rows if coding.per_channel else 1,)
        return [
            builder.tensor(
                f"{linear}.weight_codes",
                lazy(lambda: encode(read(), coding).values.t(), ir.DataType.INT8, size[0], f"{linear}.weight_codes"),
            ),
            builder.tensor(
                f"{linear}.weight_scales",
                lazy(lambda: encode(read(), coding).scales, ir.DataType.FLOAT, size[1], f"{linear}.weight_scales"),
            ),
        ]
    wanted: list[tuple[str, ir.DataType, tuple[int, ...], Read]] = [
        (
            "codes",
            ir.DataType.UINT8,
            (rows, blocks, coding.block * coding.bits // 8),
            lambda: encode(read(), coding).values,
        ),
        ("scales", ir.DataType.FLOAT, (rows, blocks, 1), lambda: encode(read(), coding).scales[..., None]),
    ]
    if coding.bits == 4:
        wanted.append(("offsets", ir.DataType.UINT8, (rows, (blocks + 1) // 2), lambda: _offsets(read(), coding)))
    return [
        builder.tensor(f"{linear}.weight_{kind}", lazy(value, dtype, size, f"{linear}.weight_{kind}"))
        for kind, dtype, size, value in wanted
    ]


def _offsets(weight: Tensor, coding: Coding) -> Tensor:
    offsets = encode(weight, coding).offsets
    if offsets is None:
        raise AssertionError("4-bit codes have offsets")
    return offsets


def shape_of(builder: GraphBuilder, numbers: Sequence[int]) -> ir.Value:
    """A constant list of whole numbers."""
    name = "numbers_" + "_".join(str(number).replace("-", "minus") for number in numbers)
    return builder.tensor(name, ir.tensor(np.array(numbers, dtype=np.int64), name=name))
