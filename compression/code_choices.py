"""From a budget to bits: measure each linear once on the unchanged model, then choose; kept for later attempts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from api_schemas.methods.tinygptv import TinygptvConfig
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from api_schemas.reports import CodeChoice, CodeOption, CodesReport
from compression.core.block_store import FolderBlockStore
from compression.core.blockwise import windows_per_chunk
from compression.core.int8_rows import quantize_rows
from compression.core.protocols import Streamed
from compression.core.tensors import read_tensor
from compression.methods.tinygptv import Chosen, choose, output_errors, squared_errors
from compression.prepare import Prepared
from compression.stages import Stages
from preflight.code_budget import CodeBudget
from preflight.quantized_plan import budget_of

TOWER = "tower"


def choose_codes(
    recipe: Recipe,
    step: TinygptvConfig,
    ready: Prepared,
    model: Streamed,
    shapes: Sequence[BlockShape],
    store: FolderBlockStore,
    stages: Stages,
) -> tuple[CodeBudget, Chosen, CodesReport]:
    """Measure, choose, and say what was chosen from.

    Every rank measures the same first windows, so all choose alike.
    """
    budget = budget_of(ready.checkpoint, ready.family, recipe, step, shapes)
    kept = store.kept("codes")
    if kept is None:
        kept = _measure(step, ready, model, budget, stages)
        store.keep("codes", kept)
    by_block: list[dict[str, Tensor]] = [{} for _ in range(model.blocks)]
    for name, numbers in kept.items():
        if name != TOWER:
            index, _, linear = name.partition(":")
            by_block[int(index)][linear] = numbers
    errors, tower_error = squared_errors(budget, by_block), float(kept[TOWER])
    chosen = choose(budget, errors, tower_error)
    rows = tuple(
        CodeChoice(
            module=one.path,
            bits=chosen.bits[one.path],
            options=tuple(
                CodeOption(bits=bits, bytes=budget.bytes_of(one, bits), error=errors[one.path][bits] ** 0.5)
                for bits in sorted({bits for base in budget.bases for bits in budget.options(one, base)}, reverse=True)
            ),
        )
        for one in budget.linears
    )
    report = CodesReport(
        limit=step.limit,
        weights=budget.total(chosen.bits, chosen.tower),
        cache=budget.needs.cache,
        activations=budget.needs.activations,
        mixes=budget.mixes,
        tower_bits=chosen.tower if budget.tower else None,
        tower_error=tower_error**0.5 if budget.tower else None,
        choices=rows,
    )
    return budget, chosen, report


def _measure(
    step: TinygptvConfig, ready: Prepared, model: Streamed, budget: CodeBudget, stages: Stages
) -> dict[str, Tensor]:
    """Squared norms of every linear's outputs and of their errors, and of the tower's weights."""
    found: dict[str, Tensor] = {}
    windows = slice(0, windows_per_chunk(ready.calibration.tokens.shape[1]))
    with stages.stage("calibrating", "measuring what each linear loses at 8 and 4 bits"):
        hidden = ready.calibration.embed(model, windows)
        for index in range(model.blocks):
            measured, hidden = output_errors(model, step, hidden, index)
            found.update({f"{index}:{linear}": numbers for linear, numbers in measured.items()})
            stages.block(f"measured block {index + 1} of {model.blocks}", index, model.blocks)
        found[TOWER] = _tower_error(budget)
    return found


def _tower_error(budget: CodeBudget) -> Tensor:
    """Mean of ‖W − Ŵ‖²/‖W‖² over the tower's linears at 8 bits, float64; 0 without a tower."""
    errors = []
    for entry in budget.tower.values():
        weight = read_tensor(entry).float()
        lost = (quantize_rows(weight).dequantized() - weight).double().square().sum()
        errors.append(lost / weight.double().square().sum().clamp_min(1e-300))
    return torch.stack(errors).mean() if errors else torch.zeros((), dtype=torch.float64)
