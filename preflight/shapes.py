"""Widths and parameter counts of decoder blocks: what a sparsity means in channels.

A block's parameters split into three parts that can shrink (MoDeGPT's types) and norms that cannot:

    mlp           gate and up `[m, d]`, down `[d, m]`                          proportional to the width m
    query_key     query `[h·r, d]`, key `[h_kv·r, d]`                          proportional to the rank r
    value_output  value `[h_kv·r, d]`, output `[d, h·r]`                       proportional to the rank r
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_schemas.errors import InvalidRecipe
from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from preflight.families import Family

RANK_STEP = 4  # ranks that allocation `marginal_error` chooses from are multiples of this


@dataclass(frozen=True)
class BlockCosts:
    """Parameters per unit of width of one block, what does not shrink, and which parts this family leaves alone."""

    per_mlp_unit: int
    per_query_key_rank: int
    per_value_output_rank: int
    fixed: int
    untouched: tuple[str, ...] = ()

    def parameters(self, shape: BlockShape) -> int:
        """Parameters of a block of this shape."""
        return (
            self.fixed
            + self.per_mlp_unit * shape.mlp_width
            + self.per_query_key_rank * shape.query_key_rank
            + self.per_value_output_rank * shape.value_output_rank
        )


def block_costs(family: Family, config: Mapping[str, Any]) -> BlockCosts:
    """Count a block's parameters per unit of each width, biases included."""
    size = family.dimensions(config)

    def bias(linear: str) -> int:
        return int(family.has_bias(linear, config))

    attention, mlp = family.attention, family.mlp
    others = sum(
        math.prod(shape) for name, shape in family.canonical_tensors(config).items() if _never_shrinks(family, name)
    )
    return BlockCosts(
        per_mlp_unit=size.experts * (sum(size.hidden + bias(linear) for linear in mlp.inputs) + size.hidden),
        per_query_key_rank=size.heads * (size.hidden + bias(attention.query))
        + size.kv_heads * (size.hidden + bias(attention.key)),
        per_value_output_rank=size.kv_heads * (size.hidden + bias(attention.value)) + size.heads * size.hidden,
        fixed=others + size.hidden * (bias(attention.output) + bias(mlp.down)),
        untouched=("query_key",) if size.qk_norm else (),
    )


def _never_shrinks(family: Family, tensor: str) -> bool:
    kept = {*family.norms, family.attention.query_norm, family.attention.key_norm}
    kept |= family.between.keys() | ({family.experts.router} if family.experts else set())
    return tensor.rpartition(".")[0] in kept


def modules_of(family: Family, config: Mapping[str, Any], step: ModegptConfig) -> tuple[str, ...]:
    """The parts that carry the sparsity on this family, in the order of `ALL_MODULES`."""
    untouched = block_costs(family, config).untouched
    return tuple(module for module in step.resolved_modules if module not in untouched)


def dense_shape(family: Family, config: Mapping[str, Any]) -> BlockShape:
    """The widths of an uncompressed block."""
    size = family.dimensions(config)
    return BlockShape(mlp_width=size.mlp_width, query_key_rank=size.head_dim, value_output_rank=size.head_dim)


def width_choices(dense: BlockShape, step: ModegptConfig, module: str) -> tuple[int, ...]:
    """The widths that allocation `marginal_error` chooses from, descending from the original's.

    MLP widths are multiples of the recipe's `round_to`, ranks of `RANK_STEP` (of 2 where a head is not); no part loses
    more than the recipe's `sparsity_cap`, hence no block does.
    """
    whole = dense.mlp_width if module == "mlp" else dense.query_key_rank
    step_size = step.resolved_round_to if module == "mlp" else (RANK_STEP if whole % RANK_STEP == 0 else 2)
    least = step_size * math.ceil((1 - step.sparsity_cap) * whole / step_size - 1e-9)
    return (whole, *range((whole - 1) // step_size * step_size, max(least, step_size) - 1, -step_size))


def most_removable(costs: BlockCosts, dense: BlockShape, step: ModegptConfig, modules: Sequence[str]) -> int:
    """Parameters that a block can lose at most under allocation `marginal_error`."""
    per_unit = {
        "mlp": costs.per_mlp_unit,
        "query_key": costs.per_query_key_rank,
        "value_output": costs.per_value_output_rank,
    }
    choices = {module: width_choices(dense, step, module) for module in modules}
    return sum(per_unit[module] * (widths[0] - widths[-1]) for module, widths in choices.items())


def held_by(dense: BlockShape, costs: BlockCosts, module: str) -> int:
    """Parameters of one part of a block."""
    per_unit, whole = {
        "mlp": (costs.per_mlp_unit, dense.mlp_width),
        "query_key": (costs.per_query_key_rank, dense.query_key_rank),
        "value_output": (costs.per_value_output_rank, dense.value_output_rank),
    }[module]
    return per_unit * whole


def rounding_step(costs: BlockCosts, step: ModegptConfig, modules: Sequence[str]) -> int:
    """Parameters between two neighbouring shapes of a block: what a uniform sparsity is rounded to the half of."""
    if "mlp" in modules:
        return step.resolved_round_to * costs.per_mlp_unit
    query_key, value_output = 2 * costs.per_query_key_rank, costs.per_value_output_rank
    if step.layout == "portable":
        return query_key + 2 * value_output
    return query_key * ("query_key" in modules) + value_output * ("value_output" in modules)


def most_per_block(costs: BlockCosts, dense: BlockShape, step: ModegptConfig, modules: Sequence[str]) -> float:
    """The sparsity that allocation `block_influence` may give a block: the recipe's cap, or what its parts hold.

    A rounding step is left in the parts, since blocks hand their rounding errors on; never below the mean.
    """
    held = sum(held_by(dense, costs, module) for module in modules)
    share = (held - rounding_step(costs, step, modules)) / costs.parameters(dense)
    return max(step.known_sparsity, min(step.sparsity_cap, share))


def shape_for(dense: BlockShape, costs: BlockCosts, step: ModegptConfig, parameters: float) -> BlockShape:
    """Find the widths whose block has about `parameters` parameters.

    All chosen parts lose the same fraction; ranks are rounded first and the MLP, where it is chosen, absorbs what
    their rounding left over, to the nearest multiple of the recipe's `round_to`.

    Raises:
        InvalidRecipe: `sparsity_impossible` when the chosen parts do not hold that many parameters.
    """
    modules = [module for module in step.resolved_modules if module not in costs.untouched]
    held = sum(held_by(dense, costs, module) for module in modules)
    fraction = (costs.parameters(dense) - parameters) / max(1, held)
    if fraction >= 1.0:
        raise InvalidRecipe(
            "sparsity_impossible",
            f"sparsity {step.known_sparsity:.4g} asks for more than modules {list(modules)} hold in one block; "
            f"lower the sparsity or name more modules",
            "recipe.steps.0.sparsity",
        )
    query_key = value_output = dense.query_key_rank
    if "query_key" in modules:
        query_key = max(2, 2 * round((1 - fraction) * dense.query_key_rank / 2))  # rotary pairs stay together
    if "value_output" in modules:
        value_output = max(1, round((1 - fraction) * dense.value_output_rank))
    if step.layout == "portable" and query_key != dense.query_key_rank:
        value_output = query_key  # stock code has one head_dim for both
    shape = BlockShape(mlp_width=dense.mlp_width, query_key_rank=query_key, value_output_rank=value_output)
    if "mlp" not in modules:
        return shape
    multiple = step.resolved_round_to
    width = dense.mlp_width - (costs.parameters(shape) - parameters) / costs.per_mlp_unit
    rounded = min(dense.mlp_width, max(multiple, multiple * round(width / multiple)))
    return shape.model_copy(update={"mlp_width": rounded})


def shapes_for(
    family: Family, config: Mapping[str, Any], step: ModegptConfig, sparsities: Sequence[float] | None = None
) -> tuple[BlockShape, ...]:
    """Widths of all blocks; `sparsities` has one per block, None means the same everywhere.

    With different sparsities the rounding error of each block is handed to the next, so that the total misses its
    target by at most half a rounding step of one block.
    """
    dense, costs = dense_shape(family, config), block_costs(family, config)
    whole = costs.parameters(dense)
    if sparsities is None:
        return (shape_for(dense, costs, step, (1 - step.known_sparsity) * whole),) * family.block_count(config)
    shapes: list[BlockShape] = []
    owed = 0.0
    for sparsity in sparsities:
        wanted = (1 - sparsity) * whole + owed
        shapes.append(shape_for(dense, costs, step, min(wanted, whole)))
        owed = wanted - costs.parameters(shapes[-1])
    return tuple(shapes)
