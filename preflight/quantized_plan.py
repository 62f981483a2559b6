"""A recipe's quantisation in the plan: the resolved list of linears, the bytes they come to, what stands in the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from api_schemas.methods import TinygptvConfig
from api_schemas.plans import Blocker, BlockShape, QuantizedModule
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint
from preflight.code_budget import CodeBudget, code_budget
from preflight.families import Family
from preflight.quantized_linears import DTYPES, block_linears, quantized_modules
from preflight.shapes import block_costs, dense_shape
from preflight.written import written


@dataclass(frozen=True)
class QuantizedPlan:
    """What the quantisation would do; empty without one.

    Attributes:
        modules: all linears that it may change.
        bytes_after: of all weights.
        blockers: what the budget rules out.
        notes: how open choices will be made.
    """

    modules: tuple[QuantizedModule, ...] = ()
    bytes_after: int = 0
    blockers: tuple[Blocker, ...] = ()
    notes: tuple[str, ...] = ()


def quantized_plan(
    checkpoint: Checkpoint, family: Family, recipe: Recipe, shapes: Sequence[BlockShape], bytes_before: int
) -> QuantizedPlan:
    """List what becomes codes, and count.

    Args:
        checkpoint: the decoder's.
        family: its table.
        recipe: with or without a quantisation.
        shapes: widths of the blocks as the step finds them.
        bytes_before: of all weights as the step finds them.
    """
    step = recipe.quantization
    if step is None:
        return QuantizedPlan(bytes_after=bytes_before)
    if isinstance(step, TinygptvConfig):
        budget = budget_of(checkpoint, family, recipe, step, shapes)
        place = f"recipe.steps.{len(recipe.steps) - 1}"
        return QuantizedPlan(budget.modules(), budget.planned, tuple(budget.blockers(place)), (budget.note(),))
    itemsize, dtype = plain_form(checkpoint, family)
    placed = checkpoint.placed
    linears = block_linears(family, checkpoint.config, step.skip_modules, shapes, layout=recipe.layout, placed=placed)
    modules = quantized_modules(linears, step, itemsize=itemsize, dtype=dtype)
    return QuantizedPlan(modules, bytes_before - sum(one.bytes_before - one.bytes_after for one in modules))


def budget_of(
    checkpoint: Checkpoint, family: Family, recipe: Recipe, step: TinygptvConfig, shapes: Sequence[BlockShape]
) -> CodeBudget:
    """The budget of method `tinygptv` on a model whose blocks have these widths."""
    itemsize, dtype = plain_form(checkpoint, family)
    config, placed = checkpoint.config, checkpoint.placed
    costs, whole = block_costs(family, config), written(checkpoint, family, recipe.layout)
    dense = costs.parameters(dense_shape(family, config)) * family.block_count(config)
    left = whole.bytes - whole.bytes_per_parameter * (dense - sum(costs.parameters(shape) for shape in shapes))
    linears = block_linears(family, config, step.skip_modules, shapes, layout=recipe.layout, placed=placed)
    return code_budget(
        checkpoint,
        family,
        step,
        linears,
        shapes,
        layout=recipe.layout,
        whole_bytes=left,
        itemsize=itemsize,
        dtype=dtype,
    )


def plain_form(checkpoint: Checkpoint, family: Family) -> tuple[int, str]:
    """Bytes of one weight of the blocks, and their dtype as codes of bitsandbytes know it."""
    block = [entry for name, entry in checkpoint.tensors.items() if name.startswith(family.block_prefix(0))]
    parameters = sum(entry.parameters for entry in block)
    itemsize = max(1, sum(entry.bytes for entry in block) // max(1, parameters))
    return itemsize, DTYPES.get(block[0].dtype, "float32") if block else "float32"
