"""The steps of a recipe, one walk each: the second starts from what the first has made, also after a kill.

structure  narrows the blocks of the original                     blocks under the store's own folder
quantize   codes for the linears of what is there by then        blocks under `quantized` inside it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from api_schemas.methods import GptqConfig, Int8Config, Nf4Config, QuantizationConfig
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from api_schemas.reports import BlockReport
from compression.core.block_store import FolderBlockStore
from compression.core.blockwise import compress_blocks
from compression.core.linear_walk import LinearMethod, LinearStream
from compression.core.protocols import BlockStore, Streamed, Walker
from compression.core.unwritten_model import NarrowedModel, QuantizedModel
from compression.methods.gptq import Gptq
from compression.methods.int8 import Int8
from compression.methods.nf4 import Nf4
from compression.methods.round_to_nearest import RoundToNearest
from compression.planning import choose_method, choose_walker
from compression.prepare import Prepared
from compression.removal import remove_blocks
from compression.stages import Stages
from preflight.quantized_linears import block_linears, kept_parts
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
    """

    model: Streamed
    shapes: Sequence[BlockShape]
    blocks: BlockStore
    source: Prepared
    removed: tuple[int, ...]
    reports: tuple[BlockReport, ...]


def run_steps(recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> Made:
    """Walk once for each step; what an earlier attempt finished is not solved again."""
    model: Streamed = ready.model
    shapes: Sequence[BlockShape] = ready.plan.blocks
    reports: list[BlockReport] = []
    last, total = store, len(recipe.steps)
    asked, removed = ready, tuple[int, ...]()
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
        said = f"quantising the linears of {model.blocks} blocks by {step.method}"
        with stages.stage("quantizing", said), ready.model.products_in(recipe.calibration.forward):
            stream = partial(_linear_stream, model, recipe, step, ready, shapes)
            reports += _walk(model, stream, last, stages, _Pass(total - 1, total, _kind(step.method, ready)))
        model = QuantizedModel(model, last)
    for one in (store, last):
        one.part_()
    return Made(model, shapes, last, ready, removed, tuple(reports))


def linear_method(step: QuantizationConfig) -> LinearMethod:
    """The method that a step names."""
    if isinstance(step, Int8Config):
        return Int8(step)
    if isinstance(step, Nf4Config):
        return Nf4(step)
    return Gptq(step) if isinstance(step, GptqConfig) else RoundToNearest(step)


def _kept(
    recipe: Recipe, step: QuantizationConfig, ready: Prepared, shapes: Sequence[BlockShape]
) -> tuple[frozenset[str], ...]:
    """Of each block, the linears that the step leaves as they are."""
    config, placed = ready.checkpoint.config, ready.checkpoint.placed
    linears = block_linears(ready.family, config, step.skip_modules, shapes, layout=recipe.layout, placed=placed)
    return kept_parts(linears, len(shapes))


def _linear_stream(
    model: Streamed, recipe: Recipe, step: QuantizationConfig, ready: Prepared, shapes: Sequence[BlockShape]
) -> LinearStream:
    """A quantisation's walker at the embeddings."""
    hidden = ready.calibration.embed(model, ready.share.windows)
    kept = _kept(recipe, step, ready, shapes)
    return LinearStream(model, linear_method(step), hidden, ready.share, kept=kept)


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
    return f"{method}, {sizes}x{size.head_dim}, {windows} windows of {length}, {torch.get_num_threads()} threads"


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
