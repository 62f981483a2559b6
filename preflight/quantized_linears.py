"""Which linears of a model become codes, by their full paths, and what each then takes: known before anything is read.

Quantised are the linears of the decoder's blocks. Embeddings, norms, routers, the head and the parts around the decoder
stay; so does what the step's `skip_modules` names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_schemas.methods import FormConfig, Int8Config, Nf4Config
from api_schemas.plans import BlockShape, QuantizedModule
from preflight.composites import Placed
from preflight.families import Dimensions, Family
from preflight.normal_float_facts import NESTED_BLOCK, facts_text

WORD_BITS = 32
SHAPE_BYTES = 16  # compressed-tensors: two 64-bit numbers
FLOAT32 = 4
OUTPUTS_ON_CPU = 32  # rows that bitsandbytes' kernel for CPUs with bfloat16 takes at once; seen by running 0.50
TABLE_BYTES, NESTED_TABLE_BYTES = 16 * FLOAT32, 256 * FLOAT32
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}  # bitsandbytes has no float64


@dataclass(frozen=True)
class BlockLinear:
    """One stored linear of one block.

    Attributes:
        block: number of its block.
        path: its module as checkpoints name it.
        in_memory: its module in the class that loads the artifact.
        parts: the canonical linears whose rows it holds.
        rows: outputs.
        columns: inputs.
        kept_by: the entry of `skip_modules` that leaves it as it is; None where it is quantised.
    """

    block: int
    path: str
    in_memory: str
    parts: tuple[str, ...]
    rows: int
    columns: int
    kept_by: str | None


def linear_groups(family: Family, size: Dimensions) -> tuple[tuple[str, ...], ...]:
    """The block linears that are quantised, in forward order; those of one group read the same input.

    Norms stay as they are, and so does a router: it is small, and its choices are hard.
    """
    names = family.attention
    mlps = [group for mlp in family.mlps(size) for group in (mlp.inputs, (mlp.down,))]
    between = [(linear,) for linear in family.between]
    return ((names.query, names.key, names.value), (names.output,), *between, *mlps)


def linear_shapes(family: Family, config: Mapping[str, Any], shape: BlockShape) -> dict[str, tuple[int, int]]:
    """`[out_features, in_features]` of each of these linears in a block of this shape."""
    size, names = family.dimensions(config), family.attention
    shapes = {
        names.query: (size.heads * shape.query_key_rank, size.hidden),
        names.key: (size.kv_heads * shape.query_key_rank, size.hidden),
        names.value: (size.kv_heads * shape.value_output_rank, size.hidden),
        names.output: (size.hidden, size.heads * shape.value_output_rank),
        **family.between_shapes(config),
    }
    for mlp in family.mlps(size):
        shapes.update({linear: (shape.mlp_width, size.hidden) for linear in mlp.inputs})
        shapes[mlp.down] = (size.hidden, shape.mlp_width)
    return shapes


def block_linears(
    family: Family,
    config: Mapping[str, Any],
    skip_modules: Sequence[str],
    shapes: Sequence[BlockShape],
    *,
    layout: str,
    placed: Placed | None,
) -> tuple[BlockLinear, ...]:
    """Every linear of every block as the artifact will store it; fused ones are one in stock layouts.

    Args:
        family: its table.
        config: the decoder's configuration.
        skip_modules: entries that match a whole path, or any run of whole words between its dots.
        shapes: widths of the blocks.
        layout: of the artifact.
        placed: where the decoder stands among other parts.
    """
    found = []
    for block, shape in enumerate(shapes):
        for stored, parts, (rows, columns) in _stored(family, config, shape, fused=layout != "full"):
            name = family.block_prefix(block) + stored
            on_disk = family.block_prefix(block) + family.stored_block_name(stored)
            path = on_disk if placed is None else placed.disk_name(on_disk)
            inside = name if placed is None else placed.name_in_memory(name)
            kept_by = next((entry for entry in skip_modules if f".{entry}." in f".{path}."), None)
            found.append(BlockLinear(block, path, inside, parts, rows, columns, kept_by))
    return tuple(found)


def _stored(
    family: Family, config: Mapping[str, Any], shape: BlockShape, *, fused: bool
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, int]]]:
    """Each stored linear of a block: its name, its canonical parts, its shape."""
    shapes = linear_shapes(family, config, shape)
    joined = {part: one for one in family.fused for part in one.parts} if fused else {}
    for linear, (rows, columns) in shapes.items():
        if linear not in joined:
            yield linear, (linear,), (rows, columns)
        elif linear == (one := joined[linear]).parts[0]:
            yield one.stored, one.parts, (sum(shapes[part][0] for part in one.parts), columns)


def code_bytes(step: FormConfig, rows: int, columns: int, *, itemsize: int, dtype: str) -> int:
    """Bytes of one linear's codes, scales and whatever else its form stores.

    Args:
        step: the quantisation.
        rows: outputs.
        columns: inputs.
        itemsize: bytes of one scale on a grid of ours.
        dtype: of the weights, such as `bfloat16`.
    """
    if isinstance(step, Int8Config):
        return rows * columns + rows * FLOAT32 + 1
    if isinstance(step, Nf4Config):
        scales = rows * columns // step.block_size
        facts = facts_text((rows, columns), step.block_size, dtype, 0.0 if step.double_quantization else None)
        stored = rows * columns // 2 + TABLE_BYTES + len(facts)
        if not step.double_quantization:
            return stored + scales * FLOAT32
        return stored + scales + -(-scales // NESTED_BLOCK) * FLOAT32 + NESTED_TABLE_BYTES
    groups = columns // step.group_size if step.group_size else 1
    return rows * (-(-columns * step.bits // WORD_BITS) * 4 + groups * itemsize) + SHAPE_BYTES


def quantized_modules(
    linears: Sequence[BlockLinear], step: FormConfig, *, itemsize: int, dtype: str
) -> tuple[QuantizedModule, ...]:
    """The resolved list for the plan: every linear of every block with bits and bytes, skipped ones too."""
    return tuple(
        QuantizedModule(
            module=one.path,
            bits=None if one.kept_by else step.bits,
            bytes_before=itemsize * one.rows * one.columns,
            bytes_after=itemsize * one.rows * one.columns
            if one.kept_by
            else code_bytes(step, one.rows, one.columns, itemsize=itemsize, dtype=dtype),
            kept_by=one.kept_by,
        )
        for one in linears
    )
