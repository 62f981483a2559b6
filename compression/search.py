"""A target for quality: trials of whole compressions, judged on text that they were not calibrated on.

What is measured of the original (block influence, prices) is measured once. A trial walks the blocks as any job does,
so what is judged is the very model that would be written; the best trial's blocks become the artifact's. Where price
lists are there they say where to try first, else a curve that rises as losses were seen to; from then on measurements
decide (`core.bracket`). Each trial is one durable line: after a kill the search goes on where it was, and comes out the
same.
"""

import json
import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from api_schemas.errors import JobFailed
from api_schemas.recipe import Recipe
from api_schemas.reports import SearchReport, Trial
from compression.core.block_store import FolderBlockStore, write_durably
from compression.core.bracket import ENOUGH, Measured, Search
from compression.core.budget import cheapest_curve
from compression.evaluation import final_states, mean_loss
from compression.planning import measure_sensitivity, price_lists
from compression.prepare import Prepared, refuse_blocked
from compression.stages import Stages
from compression.steps import run_steps
from preflight.plans import make_plan
from preflight.targets import Budget, settled
from preflight.written import written

RECORD = "trial.json"
# nats of loss for s²/(1−s): SmolLM2-135M-Instruct, layout portable, at 20 %: ln(13.249/11.900) (README)
TYPICAL_FACTOR = 2.15


@dataclass(frozen=True)
class Chosen:
    """What the pipeline goes on with: a recipe with a sparsity, its plan, its blocks, and how it was found."""

    recipe: Recipe
    ready: Prepared
    store: FolderBlockStore
    search: SearchReport | None


def choose_goal(recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> Chosen:
    """Return the recipe as it is or, where its target asks for trials, with the sparsity that they found.

    Args:
        recipe: as it was given.
        ready: texts and plan.
        store: of the job; each trial keeps its blocks in a folder inside.
        stages: progress.

    Raises:
        JobFailed: `target_not_reached` when every trial lost more than the target allows.
    """
    if not recipe.trials:
        return Chosen(recipe, ready, store, None)
    return _Trials(recipe, ready, store, stages).run()


class _Trials:
    """One search: its limits, what was measured, and what is to be tried next."""

    def __init__(self, recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> None:
        step = recipe.structure
        if step is None or step.target is None or step.target.perplexity_increase is None or ready.search is None:
            raise ValueError("only a target for perplexity, with text for its trials, is searched for")
        self.recipe, self.ready, self.store, self.stages, self.step = recipe, ready, store, stages, step
        self.target, self.increase, self.windows = step.target, step.target.perplexity_increase, ready.search
        whole = written(ready.checkpoint, ready.family, step.layout)
        self.budget = Budget.of(ready.checkpoint, ready.family, step, whole)
        self.most = self.budget.most_steps()
        curve, factor, self.predicted_from = self._curve()
        self.search = Search(math.log1p(self.increase), self.most, curve, factor)
        self.trials: dict[int, Trial] = {}

    def run(self) -> Chosen:
        """Try until the search is content or no trial is left."""
        with self.stages.stage("compressing", "measuring the original on the search's text"):
            before = self._loss_before()
        while len(self.trials) < self.target.most_trials:
            steps = self.search.next(self._points(before))
            if steps is None:
                break
            self.trials[steps] = self._trial(steps, before)
            self._forget_losers(before)
        best = self.search.success(self._points(before))
        if best.steps == 0:
            raise self._not_reached(before)
        recipe, ready, store = self._at(best.steps)
        return Chosen(recipe, ready, store, self._report(best.steps, before))

    def _curve(self) -> tuple[Callable[[int], float], float, str]:
        """Loss expected at so many steps, the factor to begin with, and what both rest on."""
        if self.step.resolved_allocation != "marginal_error":
            said = f"a curve s²/(1−s) times {TYPICAL_FACTOR}, as seen on SmolLM2-135M; corrected by every trial"
            return lambda steps: _quadratic(self._sparsity(steps)), TYPICAL_FACTOR, said
        measure_sensitivity(self.recipe, self.ready, self.store, self.stages)
        saved, prices = zip(*cheapest_curve(price_lists(self.ready, self.store)), strict=True)
        whole = self.budget.whole
        said = "the price lists, in nats; corrected by every trial"
        return lambda steps: _between(saved, prices, self._sparsity(steps) * whole), 1.0, said

    def _sparsity(self, steps: int) -> float:
        return min(steps * self.budget.step_sparsity, self.budget.largest_sparsity())

    def _at(self, steps: int) -> tuple[Recipe, Prepared, FolderBlockStore]:
        recipe = settled(self.recipe, self._sparsity(steps))
        plan = make_plan(self.ready.checkpoint, recipe, model=self.ready.plan.model)
        refuse_blocked(plan)
        store = FolderBlockStore(self.store.folder / f"trial-{steps:07d}", statistics=self.store.statistics)
        return recipe, replace(self.ready, plan=plan), store

    def _points(self, before: float) -> list[Measured]:
        return [Measured(steps, math.log(trial.perplexity) - before) for steps, trial in self.trials.items()]

    def _loss_before(self) -> float:
        """Mean loss of the original on the search's text, measured once."""
        kept = self.store.folder / "search-original.json"
        if not kept.exists():
            states = final_states(self.ready.model, self.windows.tokens, _nobody)
            loss = mean_loss(self.ready.model, states, self.windows.tokens)
            write_durably(kept, json.dumps({"loss": loss}).encode())
        return float(json.loads(kept.read_text())["loss"])

    def _trial(self, steps: int, before: float) -> Trial:
        """Make and measure one trial, or read what an earlier attempt measured."""
        number, most, started = len(self.trials), self.target.most_trials, time.perf_counter()
        said = f"trial {number + 1} of at most {most}: sparsity {self._sparsity(steps):.4f}"
        with self.stages.stage("compressing", said):
            recipe, ready, store = self._at(steps)
        record = store.folder / RECORD
        if record.exists():
            return Trial.model_validate_json(record.read_text())
        expected = self.search.expected(self._points(before), steps)
        with self.stages.part(number, most):
            made = run_steps(recipe, ready, store, self.stages)
        with self.stages.stage("compressing", f"trial {number + 1} is made, and is measured"):
            loss = mean_loss(made.model, final_states(made.model, self.windows.tokens, _nobody), self.windows.tokens)
        gone = self.budget.whole - sum(map(self.budget.costs.parameters, made.shapes))
        trial = Trial(
            sparsity=gone / self.budget.whole,
            parameters=self.budget.written.parameters - gone,
            predicted_perplexity=math.exp(before + expected),
            perplexity=math.exp(loss),
            increase=math.expm1(loss - before),
            within_target=loss - before <= self.search.limit,
            seconds=time.perf_counter() - started,
        )
        write_durably(record, trial.model_dump_json().encode())
        return trial

    def _forget_losers(self, before: float) -> None:
        """Keep the blocks of the best trial alone: two at a time are the most that lie on disk."""
        best = self.search.success(self._points(before)).steps
        for steps in self.trials:
            folder = self.store.folder / f"trial-{steps:07d}"
            if steps != best:
                for path in folder.glob("block-*"):
                    path.unlink()
                shutil.rmtree(folder / "quantized", ignore_errors=True)

    def _not_reached(self, before: float) -> JobFailed:
        least = min(self.trials.values(), key=lambda trial: trial.sparsity)
        return JobFailed(
            "target_not_reached",
            f"target.perplexity_increase {self.increase}: each of {len(self.trials)} trials lost more; the smallest, "
            f"at sparsity {least.sparsity:.4f}, raised perplexity from {math.exp(before):.3f} to "
            f"{least.perplexity:.3f} ({least.increase:+.2%}). Raise the target, allow more trials, or calibrate "
            "on more text",
            "recipe.steps.0.target.perplexity_increase",
        )

    def _report(self, best: int, before: float) -> SearchReport:
        order: Sequence[int] = sorted(self.trials, key=lambda steps: (-self.trials[steps].parameters, steps))
        return SearchReport(
            target=self.target,
            text=self.windows.use.model_copy(update={"source": f"{self.windows.use.source} (held out)"}),
            perplexity_before=math.exp(before),
            predicted_from=self.predicted_from,
            frontier=tuple(self.trials[steps] for steps in order),
            chosen=order.index(best),
            ended=self._ended(best, before),
        )

    def _ended(self, best: int, before: float) -> str:
        points = self._points(before)
        if self.search.next(points) is not None:
            return f"{self.target.most_trials} trials were made"
        if best == self.most:
            return "nothing more can be removed under the recipe's own limits"
        if self.search.success(points).loss >= ENOUGH * self.search.limit:
            return f"the chosen trial uses {ENOUGH:.0%} of what the target allows, or more"
        return "no width lies between the chosen trial and one that lost too much"


def _nobody(_: int) -> None:
    """Hears of a measured block; the stage's own line is enough."""


def _quadratic(sparsity: float) -> float:
    """About quadratic at first, for the least needed goes first; without end towards 1."""
    return sparsity * sparsity / (1 - sparsity)


def _between(saved: Sequence[int], prices: Sequence[float], wanted: float) -> float:
    """The price of saving so much, by straight lines between the curve's points."""
    at = min(max(1, bisect_right(saved, wanted)), len(saved) - 1)
    share = (wanted - saved[at - 1]) / (saved[at] - saved[at - 1])
    return prices[at - 1] + min(1.0, share) * (prices[at] - prices[at - 1])
