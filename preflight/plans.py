"""A dry run: what a recipe would do to a checkpoint, from its configuration and headers alone."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from api_schemas.errors import InvalidRecipe
from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.models import CheckpointFacts
from api_schemas.plans import Blocker, BlockShape, Plan, RuntimeSupport
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint, describe
from preflight.estimates import Workload, disk_bytes, flops
from preflight.exports import export_blockers, export_bytes
from preflight.families import Family, resolve
from preflight.gguf_rules import PER_BLOCK_FAMILIES
from preflight.part_rules import part_recipe_blockers, part_runtimes, part_warnings, seeing_bytes
from preflight.quantization import quantization_blockers, quantized_runtimes
from preflight.quantized_plan import quantized_plan
from preflight.removal import remaining_shapes, removal_blockers
from preflight.rotary import STATIC_ROTARY, rope_type, window_of
from preflight.rows import row_notes, row_warnings
from preflight.runtimes import runtime_support
from preflight.shapes import block_costs, dense_shape, modules_of, most_removable
from preflight.step_plans import step_plans
from preflight.targets import settle, settled_by, smallest_shapes
from preflight.written import Written, written

ASSUMED_FLOPS_PER_CORE = 25e9
EXPERT_WIDTHS = 8  # rows of 16 bytes in 16-bit weights
LAYOUT_VERSION = 1  # part of every recipe hash: raise it when the mathematics of a method changes


def recipe_hash(recipe: Recipe, model: str) -> str:
    """Fingerprint of what determines an artifact; finished blocks are only reused under the same one."""
    text = json.dumps(
        {"recipe": recipe.model_dump(mode="json"), "model": model, "version": LAYOUT_VERSION}, sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, model: str, flops_per_second: float | None = None) -> Plan:
    """Say what would happen, how large it would be and what stands in the way.

    Args:
        checkpoint: an opened checkpoint.
        recipe: what to do.
        model: its name, for the answer.
        flops_per_second: rate of an earlier job on this machine; None assumes one and says so.

    Raises:
        InvalidCheckpoint: `unsupported_architecture` or `invalid_config`; everything else is a blocker in the plan.
    """
    facts, asked = describe(checkpoint), recipe.structure
    checkpoint = checkpoint.decoder
    family = resolve(checkpoint.config)
    whole = written(checkpoint, family, recipe.layout)
    step, unmet = (None, []) if asked is None else settle(checkpoint, family, recipe, asked, whole)
    blockers = [*facts.blockers, *unmet, *part_recipe_blockers(checkpoint, recipe)]
    shapes = _shapes(family, checkpoint.config, step, blockers)
    narrow = smallest_shapes(checkpoint, family, asked, whole) if asked and asked.trials else shapes
    blockers += quantization_blockers(family, checkpoint.config, recipe, narrow, checkpoint.placed)
    counts = _count(checkpoint, family, facts, shapes, whole)
    work = Workload.of(family, checkpoint, recipe, shapes)
    size = family.dimensions(checkpoint.config)
    blockers += export_blockers(checkpoint, family, recipe, narrow)
    exported = export_bytes(recipe, size, int(counts["parameters_after"]), shapes)
    quantized = quantized_plan(checkpoint, family, recipe, shapes, int(counts["bytes_after"]))
    blockers += quantized.blockers
    steps = step_plans(checkpoint.config, family, recipe, shapes, work, counts, quantized.bytes_after)
    times = max(1, recipe.trials)
    operations = flops(work) + times * sum(one.flops for one in steps if one.method != "modegpt")
    final, bytes_after = _final(step, recipe), steps[-1].bytes_after
    return Plan(
        model=model,
        family=family.name,
        layout=recipe.layout,
        steps=steps,
        modules=() if step is None else modules_of(family, checkpoint.config, step),
        sparsity_requested=None if recipe.trials else 0.0 if step is None else step.known_sparsity,
        **{**counts, "bytes_after": bytes_after},
        quantized=quantized.modules,
        blocks=shapes,
        shapes_final=final,
        peak_memory_bytes=max(seeing_bytes(checkpoint, family, recipe), *(one.peak_memory_bytes for one in steps)),
        disk_bytes=disk_bytes(work, bytes_after + exported) + min(2, times) * (bytes_after if len(steps) > 1 else 0),
        flops=operations,
        **_time(operations, flops_per_second),
        runtimes=_runtimes(checkpoint, family, recipe, narrow, shapes),
        notes=_plan_notes(checkpoint, family, recipe, step, shapes) + quantized.notes,
        warnings=(*_warnings(checkpoint, facts, recipe), *row_warnings(recipe, size, shapes, final=final)),
        blockers=tuple(blockers),
    )


def _final(step: ModegptConfig | None, recipe: Recipe) -> bool:
    """Whether the widths do not depend on data."""
    return step is None or (step.resolved_allocation == "uniform" and not recipe.trials)


def _plan_notes(
    checkpoint: Checkpoint,
    family: Family,
    recipe: Recipe,
    step: ModegptConfig | None,
    shapes: Sequence[BlockShape],
) -> tuple[str, ...]:
    """Choices that the recipe left open about widths, and how they were made."""
    size = family.dimensions(checkpoint.config)
    return (
        *_notes(family, checkpoint.config, step),
        *settled_by(recipe.structure, step),
        *row_notes(recipe, size, shapes),
    )


def _shapes(
    family: Family, config: Mapping[str, Any], step: ModegptConfig | None, blockers: list[Blocker]
) -> tuple[BlockShape, ...]:
    """Widths of all blocks, the original's where nothing narrows them; adds to `blockers` why they are impossible."""
    dense = (dense_shape(family, config),) * family.block_count(config)
    if step is None:
        return dense
    blockers += recipe_blockers(family, config, step)
    if removal := removal_blockers(family, config, step):
        blockers += removal
        return dense
    try:
        return remaining_shapes(family, config, step)
    except InvalidRecipe as impossible:
        if impossible.code not in {blocker.code for blocker in blockers}:  # the budget of mode refined says it closer
            blockers.append(Blocker(code=impossible.code, message=impossible.message, param=impossible.param))
        return dense


def _count(
    checkpoint: Checkpoint, family: Family, facts: CheckpointFacts, shapes: Sequence[BlockShape], whole: Written
) -> dict[str, Any]:
    """Parameters and bytes before and after, and of the parts; blocks keep their dtype, all else is untouched."""
    costs = block_costs(family, checkpoint.config)
    blocks = family.block_count(checkpoint.config)
    before = costs.parameters(dense_shape(family, checkpoint.config)) * blocks
    after = sum(costs.parameters(shape) for shape in shapes)
    return {
        "parts": facts.parts,
        "sparsity_planned": 1 - after / before,
        "parameters_before": facts.parameters,
        "parameters_after": whole.parameters - before + after,
        "block_parameters_before": before,
        "block_parameters_after": after,
        "bytes_before": facts.bytes,
        "bytes_after": whole.bytes - whole.bytes_per_parameter * (before - after),
    }


def _runtimes(
    checkpoint: Checkpoint,
    family: Family,
    recipe: Recipe,
    narrow: Sequence[BlockShape],
    shapes: Sequence[BlockShape],
) -> tuple[RuntimeSupport, ...]:
    """What loads the result; `narrow` are the narrowest blocks that a search may come to."""
    config = checkpoint.config
    plain = part_runtimes(checkpoint.placed, recipe.layout) or runtime_support(
        family, config, recipe.layout, narrow, recipe.exports
    )
    return quantized_runtimes(family, config, recipe, shapes, plain)


def _warnings(checkpoint: Checkpoint, facts: CheckpointFacts, recipe: Recipe) -> tuple[str, ...]:
    return (*facts.warnings, *part_warnings(checkpoint.placed, recipe))


def _time(operations: float, flops_per_second: float | None) -> dict[str, Any]:
    """Estimated seconds, and what the estimate rests on."""
    if flops_per_second is not None:
        return {
            "estimated_seconds": operations / flops_per_second,
            "estimate_basis": "the rate of the last job on this server",
        }
    cores = os.cpu_count() or 1
    basis = f"assumed {ASSUMED_FLOPS_PER_CORE / 1e9:.0f} GFLOP/s per core, {cores} cores; not measured yet"
    return {"estimated_seconds": operations / (ASSUMED_FLOPS_PER_CORE * cores), "estimate_basis": basis}


def recipe_blockers(family: Family, config: Mapping[str, Any], step: ModegptConfig) -> list[Blocker]:
    """Why this step cannot be carried out on this family, by name."""
    blockers = []
    if family.has_qk_norm(config) and "query_key" in (step.modules or ()):
        blockers.append(
            Blocker(
                code="qk_norm",
                message=f"modules {list(step.resolved_modules)}: {family.name} normalises queries and keys over all "
                "channels of a head, so none of them can go; leave 'query_key' out",
                param="recipe.steps.0.modules",
            )
        )
    if step.layout == "portable":
        blockers += _portable_blockers(family, config, step) + _expert_blockers(family, step)
    if step.layout == "nemotron":
        blockers += _nemotron_blockers(family, config)
    if step.mode == "refined":
        blockers += _budget_blockers(family, config, step)
    return blockers


def _portable_blockers(family: Family, config: Mapping[str, Any], step: ModegptConfig) -> list[Blocker]:
    """Why stock classes could not load reduced attention."""
    attention, rotary = {"query_key", "value_output"} & set(step.resolved_modules), rope_type(config)
    if not attention:
        return []
    found = []
    if len(attention) == 1:
        message = (
            f"modules {list(step.resolved_modules)}: stock code has one head_dim for query-key and value-output, so "
            "layout 'portable' reduces both or neither; name both or use layout 'full'"
        )
        found.append(Blocker(code="portable_needs_both", message=message, param="recipe.steps.0.modules"))
    if not _head_dim_is_free(family, config):
        message = (
            f"stock {family.architecture} cannot load attention with fewer channels per head, so layout 'portable' "
            "cannot reduce it; use modules ['mlp'] or layout 'full'"
        )
        found.append(Blocker(code="head_dim_not_free", message=message, param="recipe.steps.0.modules"))
    if rotary not in STATIC_ROTARY:
        message = (
            f"rotary type {rotary!r} cannot be written as fixed factors ({', '.join(STATIC_ROTARY)} can); use modules "
            "['mlp'] or layout 'full'"
        )
        found.append(Blocker(code="rotary_not_static", message=message, param="recipe.steps.0.layout"))
    return found


def _nemotron_blockers(family: Family, config: Mapping[str, Any]) -> list[Blocker]:
    """Why NVIDIA's class for MLP widths per block could not compute the model."""
    window = window_of(config)
    if family.name in PER_BLOCK_FAMILIES and not window:
        return []
    what = f"a {family.name} with a window of {window} tokens" if window else family.name
    message = (
        f"layout 'nemotron' has widths per block for {', '.join(PER_BLOCK_FAMILIES)} alone, not for {what}; use layout "
        "'portable' or 'full'"
    )
    return [Blocker(code="nemotron_family", message=message, param="recipe.steps.0.layout")]


def _expert_blockers(family: Family, step: ModegptConfig) -> list[Blocker]:
    """Why stock kernels for experts could not run the widths."""
    if family.experts is None or step.resolved_round_to % EXPERT_WIDTHS == 0:
        return []
    message = (
        f"round_to {step.resolved_round_to}: stock transformers multiplies all experts at once, by a kernel that wants "
        f"widths divisible by {EXPERT_WIDTHS}; give a multiple of {EXPERT_WIDTHS} or use layout 'full'"
    )
    return [Blocker(code="expert_width", message=message, param="recipe.steps.0.round_to")]


def _budget_blockers(family: Family, config: Mapping[str, Any], step: ModegptConfig) -> list[Blocker]:
    """Why the widths that may be chosen cannot save as much as is asked."""
    if step.resolved_allocation != "marginal_error":
        return []
    dense, costs = dense_shape(family, config), block_costs(family, config)
    modules = modules_of(family, config, step)
    most = most_removable(costs, dense, step, modules) / costs.parameters(dense)
    if step.known_sparsity <= most:
        return []
    message = (
        f"sparsity {step.known_sparsity}: modules {list(modules)} can lose at most {most:.3f} of a block under "
        f"sparsity_cap {step.sparsity_cap}; lower the sparsity, raise the cap, or name more modules"
    )
    return [Blocker(code="sparsity_impossible", message=message, param="recipe.steps.0.sparsity")]


def _head_dim_is_free(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether stock code loads heads of another size: not where norms or partial rotation are bound to the old one."""
    size = family.dimensions(config)
    return family.head_dim_is_free and not size.qk_norm and size.rotary_width == size.head_dim


def _notes(family: Family, config: Mapping[str, Any], step: ModegptConfig | None) -> tuple[str, ...]:
    notes: list[str] = []
    if step is None:
        return ()
    if family.has_qk_norm(config):
        notes.append("query_key is left alone: queries and keys are normalised over all channels of a head")
    if step.modules is None:
        notes.append(f"modules {list(modules_of(family, config, step))}: the default of layout {step.layout!r}")
    if step.remove_blocks:
        notes.append(f"{step.remove_blocks} blocks go whole: those of least block influence on the calibration text")
    if step.resolved_allocation == "block_influence":
        notes.append("widths per block follow from block influence, measured on the calibration text; the total stays")
    if step.resolved_allocation == "marginal_error":
        notes.append("widths per block and part follow from measured prices; the total stays")
    return tuple(notes)
