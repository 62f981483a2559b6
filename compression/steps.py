"""The steps of a recipe, one walk each: the second starts from what the first has made, also after a kill.

structure  narrows the blocks of the original                     blocks under the store's own folder
quantize   codes for the linears of what is there by then        blocks under `quantized` inside it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from api_schemas.reports import BlockReport
from compression.core.block_store import FolderBlockStore
from compression.core.blockwise import compress_blocks
from compression.core.protocols import BlockStore, Streamed, Walker
from compression.core.unwritten_model import NarrowedModel, QuantizedModel
from compression.planning import choose_method, choose_walker
from compression.prepare import Prepared
from compression.quantizing import Quantization, quantizing_walk, settle_quantization
from compression.removal import remove_blocks
from compression.stages import Stages
from preflight.targets import require_met, settled


@dataclass(frozen=True)
class Made:
    """What the steps have made, before it is written.

    Attributes:
        model: streams as the artifact will.
        shapes: widths of its blocks.
        blocks: its finished blocks, as they are to be stored.
        source: what the first step started from: the original, or what removal has left of it.
        removed: blocks of the original that went whole.
        reports: of all blocks of the first step, then of the second.
        quantization: what the second step, or the only one, has settled; None where nothing is quantised.
    """

    model: Streamed
    shapes: Sequence[BlockShape]
    blocks: BlockStore
    source: Prepared
    removed: tuple[int, ...]
    reports: tuple[BlockReport, ...]
    quantization: Quantization | None = None


def run_steps(recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> Made:
    """Walk once for each step; what an earlier attempt finished is not solved again."""
    model: Streamed = ready.model
    shapes: Sequence[BlockShape] = ready.plan.blocks
    reports: list[BlockReport] = []
    last, total = store, len(recipe.steps)
    asked, removed = ready, tuple[int, ...]()
    done: Quantization | None = None
    if recipe.structure is not None:
        exact = settled(recipe, ready.plan.sparsity_requested)
        exact, ready, removed = remove_blocks(exact, asked, store, stages)
        model = ready.model
        with ready.model.products_in(recipe.calibration.forward):
            method = choose_method(exact, ready, store, stages)
            require_met(asked.checkpoint, ready.family, recipe.structure, tuple(method.shapes))
            with stages.stage("compressing", f"compressing {model.blocks} blocks"):
                start = partial(choose_walker, exact, ready, method, store)
                kind = f"{recipe.structure.method} {recipe.structure.mode} {recipe.structure.layout}"
                reports += _walk(model, start, store, stages, _Pass(0, total, _kind(kind, ready)))
        model, shapes = NarrowedModel(ready.model, method, store), method.shapes
    if (step := recipe.quantization) is not None:
        last = FolderBlockStore(store.folder / "quantized", store.group)
        done = settle_quantization(recipe, step, ready, model, shapes, last, stages)
        said = f"quantising the linears of {model.blocks} blocks by {step.method}"
        with stages.stage("quantizing", said), ready.model.products_in(recipe.calibration.forward):
            stream = partial(quantizing_walk, model, done.methods, ready)
            reports += _walk(model, stream, last, stages, _Pass(total - 1, total, _kind(step.method, ready)))
        model = QuantizedModel(model, last)
    for one in (store, last):
        one.part_()
    return Made(model, shapes, last, ready, removed, tuple(reports), done)


@dataclass(frozen=True)
class _Pass:
    """Which walk it is: step `number` of `total`, and what its blocks' times may be compared with."""

    number: int
    total: int
    kind: str


def _kind(method: str, ready: Prepared) -> str:
    """Blocks of one kind take the same time on equal workers: method, model's sizes, text, threads."""
    size, (windows, length) = ready.model.size, ready.calibration.tokens.shape
    sizes = f"hidden {size.hidden}, mlp {size.mlp_width}x{size.experts}, heads {size.heads}/{size.kv_heads}"
    where = f"{ready.model.device.type}, {torch.get_num_threads()} threads"
    return f"{method}, {sizes}x{size.head_dim}, {windows} windows of {length}, {where}"


def _walk(
    model: Streamed, start: Callable[[], Walker], store: FolderBlockStore, stages: Stages, walk: _Pass
) -> list[BlockReport]:
    reports: list[BlockReport] = []
    number, total = walk.number, walk.total
    said = f"step {number + 1} of {total}, " if total > 1 else ""
    again = start if store.group.size == 1 else None
    for report in compress_blocks(model, start(), store, number, again=again):
        reports.append(report)
        done = f"{report.sparsity:.1%} removed" if stages.name == "compressing" else f"{_shrunk(report):.1%} smaller"
        stages.block(
            f"{said}block {report.block + 1} of {model.blocks}: {done}, error {report.relative_output_error:.3f}",
            report.block,
            model.blocks,
            step=number,
            seconds=report.seconds,
            relative_output_error=report.relative_output_error,
            **({"kind": walk.kind} if report.block in store.solved_here and report.rerun is None else {}),
        )
        if report.rerun is not None:
            stages.warn(f"block {report.block + 1} was solved again: {report.rerun.reason}; {report.rerun.verdict}")
    return reports


def _shrunk(report: BlockReport) -> float:
    return 1 - report.bytes.after / report.bytes.before
