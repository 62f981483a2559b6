"""What each step of a recipe changes, in bytes, operations and memory; the plan adds them up."""

from collections.abc import Mapping, Sequence
from typing import Any

from api_schemas.plans import BlockShape, StepPlan
from api_schemas.recipe import Recipe
from preflight.estimates import Workload, flops, peak_memory_bytes
from preflight.families import Family
from preflight.quantization import walk_bytes, walk_flops


def step_plans(
    config: Mapping[str, Any],
    family: Family,
    recipe: Recipe,
    shapes: Sequence[BlockShape],
    work: Workload,
    counts: Mapping[str, Any],
    bytes_quantized: int,
) -> tuple[StepPlan, ...]:
    """What each step changes; the second starts from what the first leaves."""
    steps = []
    before, after = int(counts["bytes_before"]), int(counts["bytes_after"])
    common = {"parameters_after": counts["parameters_after"], "peak_memory_bytes": peak_memory_bytes(work)}
    if recipe.structure is not None:
        changed = {"parameters_before": counts["parameters_before"], "bytes_before": before, "bytes_after": after}
        steps.append(StepPlan(method=recipe.structure.method, flops=flops(work), **changed, **common))
    if (step := recipe.quantization) is not None:
        changed = {
            "parameters_before": counts["parameters_after"],
            "bytes_before": after,
            "bytes_after": bytes_quantized,
        }
        common["peak_memory_bytes"] += walk_bytes(family, config, shapes[0])
        operations = walk_flops(family, config, step, shapes, work.calibration_tokens)
        steps.append(StepPlan(method=step.method, flops=operations, **changed, **common))
    return tuple(steps)
