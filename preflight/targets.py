"""From a target to a sparsity, by counting in whole numbers: headers alone, nothing is computed.

A uniform sparsity is rounded to the nearest width, up or down; a plan for a target must end below it. So the sparsity
that meets the target exactly is tried, then the one half a rounding step beyond, which ends at most one whole step
below. Allocation `marginal_error` saves at least what it is asked for; `block_influence` hands rounding errors on from
block to block, and what is left of them at the end is at most half a step.

A target for quality cannot be counted out. For its trials, removals are counted in whole rounding steps, so that no two
trials come to the same widths.
"""

import math
from dataclasses import dataclass

from api_schemas.errors import InvalidRecipe
from api_schemas.methods.modegpt import SPARSITY_LIMIT, ModegptConfig
from api_schemas.plans import Blocker, BlockShape
from api_schemas.recipe import Recipe
from api_schemas.targets import Target
from preflight.checkpoint import Checkpoint
from preflight.families import Family
from preflight.shapes import (
    BlockCosts,
    block_costs,
    dense_shape,
    held_by,
    modules_of,
    most_removable,
    rounding_step,
    shapes_for,
)
from preflight.written import Written, written


@dataclass(frozen=True)
class Budget:
    """A target in numbers: what is there, and what must go."""

    step: ModegptConfig
    family: Family
    checkpoint: Checkpoint
    written: Written
    costs: BlockCosts
    dense: BlockShape
    modules: tuple[str, ...]
    blocks: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, family: Family, step: ModegptConfig, whole: Written) -> "Budget":
        """Count one checkpoint under one step."""
        config = checkpoint.config
        return cls(
            step=step,
            family=family,
            checkpoint=checkpoint,
            written=whole,
            costs=block_costs(family, config),
            dense=dense_shape(family, config),
            modules=modules_of(family, config, step),
            blocks=family.block_count(config),
        )

    @property
    def whole(self) -> int:
        """Parameters of all blocks."""
        return self.blocks * self.costs.parameters(self.dense)

    def excess(self, target: Target) -> int:
        """Parameters that must go so that the target is met; 0 or less where it is met already."""
        if target.goal == "parameters":
            return self.written.parameters - target.limit
        beyond = self.written.bytes + self.written.overhead - target.limit
        return -(-beyond // self.written.bytes_per_parameter)

    def size_after(self, goal: str, saved: int) -> int:
        """The size, in the unit of a goal, once so many parameters are gone."""
        if goal == "parameters":
            return self.written.parameters - saved
        return self.written.bytes + self.written.overhead - saved * self.written.bytes_per_parameter

    def saved_at(self, sparsity: float) -> int:
        """Parameters that a uniform sparsity removes, after rounding."""
        shapes = shapes_for(self.family, self.checkpoint.config, self.step.at(sparsity))
        return self.whole - sum(map(self.costs.parameters, shapes))

    def largest_sparsity(self) -> float:
        """The sparsity beyond which the recipe's own limits do not let a block go."""
        block = self.costs.parameters(self.dense)
        if self.step.resolved_allocation == "marginal_error":
            removable = most_removable(self.costs, self.dense, self.step, self.modules)
        else:  # the parts may not vanish: one parameter is left
            removable = sum(held_by(self.dense, self.costs, module) for module in self.modules) - 1
        return min(self.step.sparsity_cap, SPARSITY_LIMIT * (1 - 1e-9), max(0, removable) / block)

    @property
    def step_sparsity(self) -> float:
        """The sparsity of one rounding step: of every block where all share one width, else of a single block."""
        one = rounding_step(self.costs, self.step, self.modules)
        uniform = self.step.resolved_allocation == "uniform"
        return one / (self.costs.parameters(self.dense) if uniform else self.whole)

    def most_steps(self) -> int:
        """How many rounding steps a trial can remove."""
        return math.floor(self.largest_sparsity() / self.step_sparsity + 1e-9)


def settle(
    checkpoint: Checkpoint, family: Family, recipe: Recipe, step: ModegptConfig, whole: Written
) -> tuple[ModegptConfig, list[Blocker]]:
    """Return the step with a sparsity in the place of its target, and what stands in the way.

    A step that has a sparsity comes back as it is; for a target for quality, which trials must find, it is 0. The
    blockers are `target_already_met`, when nothing needs to go, `target_unreachable`, with the least size that the
    recipe can reach, and `target_before_quantization`, for bytes of which this step does not decide.
    """
    if step.target is None:
        return step, []
    if step.target.bytes is not None and recipe.quantization is not None:
        return step.at(0.0), [_before_quantization(recipe.quantization.method)]
    budget = Budget.of(checkpoint, family, step, whole)
    if step.trials:
        return step.at(0.0), [] if budget.most_steps() else [_nothing_to_try(budget)]
    excess, largest = budget.excess(step.target), budget.largest_sparsity()
    if excess <= 0:
        return step.at(0.0), [_already_met(budget, step.target)]
    found = _sparsity(budget, excess, largest)
    if found is None:
        return step.at(largest), [_unreachable(budget, step.target, largest)]
    return step.at(found), []


def settled_by(asked: ModegptConfig | None, step: ModegptConfig | None) -> tuple[str, ...]:
    """A note for the plan: which sparsity the target came to, or that trials must find it."""
    if asked is None or step is None or asked.target is None:
        return ()
    if asked.trials:
        return (
            f"widths follow from measurement: at most {asked.trials} trials, judged on windows beyond the "
            "calibration's; parameters, bytes, disk, memory and time are upper bounds",
        )
    return (f"sparsity {step.known_sparsity:.4f} follows from target.{asked.target.goal} {asked.target.limit}",)


def smallest_shapes(
    checkpoint: Checkpoint, family: Family, step: ModegptConfig, whole: Written
) -> tuple[BlockShape, ...]:
    """The narrowest blocks that a search may come to: what exports and runtimes must be asked about."""
    largest = Budget.of(checkpoint, family, step, whole).largest_sparsity()
    return shapes_for(family, checkpoint.config, step.at(largest))


def settled(recipe: Recipe, sparsity: float | None) -> Recipe:
    """The recipe with a sparsity in the place of its target; as it is where there is none yet."""
    if sparsity is None:
        return recipe
    steps = tuple(step.at(sparsity) if isinstance(step, ModegptConfig) else step for step in recipe.steps)
    return recipe.model_copy(update={"steps": steps})


def require_met(checkpoint: Checkpoint, family: Family, step: ModegptConfig, shapes: tuple[BlockShape, ...]) -> None:
    """Check widths that were chosen from data against the target, before the first block is solved.

    Raises:
        InvalidRecipe: `target_unreachable`: the widths that the data asked for had to be rounded up.
    """
    if step.target is None or step.trials:
        return
    budget = Budget.of(checkpoint, family, step, written(checkpoint, family, step.layout))
    saved = budget.whole - sum(map(budget.costs.parameters, shapes))
    if saved < budget.excess(step.target):
        goal = step.target.goal
        raise InvalidRecipe(
            "target_unreachable",
            f"target.{goal} {step.target.limit}: the widths that allocation {step.resolved_allocation!r} chose from "
            f"the calibration text leave {budget.size_after(goal, saved)}; raise the target or lower round_to",
            f"recipe.steps.0.target.{goal}",
        )


def _sparsity(budget: Budget, excess: int, largest: float) -> float | None:
    """The least sparsity that saves at least `excess` parameters, to within a rounding step; None where none does."""
    half = rounding_step(budget.costs, budget.step, budget.modules) / 2
    exact = excess / budget.whole
    if budget.step.resolved_allocation == "marginal_error":
        return exact if exact <= largest else None
    if budget.step.resolved_allocation == "block_influence":
        beyond = (excess + half) / budget.whole
        return beyond if beyond <= largest else None
    beyond = (-(-excess // budget.blocks) + half) * budget.blocks / budget.whole
    candidates = (min(wanted, largest) for wanted in (exact, beyond, largest) if wanted > 0)
    return next((sparsity for sparsity in candidates if budget.saved_at(sparsity) >= excess), None)


def _before_quantization(method: str) -> Blocker:
    message = (
        f"target.bytes together with a step {method!r}: the size of the artifact is that of its codes, which widths "
        "alone do not decide; give target.parameters, target.perplexity_increase (of both steps together) or a sparsity"
    )
    return Blocker(code="target_before_quantization", message=message, param="recipe.steps.0.target.bytes")


def _nothing_to_try(budget: Budget) -> Blocker:
    step = budget.step
    message = (
        f"target.perplexity_increase: modules {list(budget.modules)} cannot lose even one rounding step (round_to "
        f"{step.resolved_round_to}) under sparsity_cap {step.sparsity_cap}; lower round_to or raise the cap"
    )
    return Blocker(code="target_unreachable", message=message, param="recipe.steps.0.target.perplexity_increase")


def _already_met(budget: Budget, target: Target) -> Blocker:
    message = (
        f"target.{target.goal} {target.limit}: the model has {budget.size_after(target.goal, 0)} already, so nothing "
        "needs to go; lower the target, or use the model as it is"
    )
    return Blocker(code="target_already_met", message=message, param=f"recipe.steps.0.target.{target.goal}")


def _unreachable(budget: Budget, target: Target, largest: float) -> Blocker:
    if budget.step.resolved_allocation == "uniform":
        saved = budget.saved_at(largest) if largest > 0 else 0
    else:
        half = rounding_step(budget.costs, budget.step, budget.modules) / 2
        handed_on = half if budget.step.resolved_allocation == "block_influence" else 0.0
        saved = math.floor(largest * budget.whole - handed_on)
    message = (
        f"target.{target.goal} {target.limit}: at least {budget.size_after(target.goal, saved)} are left when modules "
        f"{list(budget.modules)} lose all they can under sparsity_cap {budget.step.sparsity_cap} (embeddings, norms "
        "and head stay); raise the target, raise the cap, or name more modules"
    )
    return Blocker(code="target_unreachable", message=message, param=f"recipe.steps.0.target.{target.goal}")
