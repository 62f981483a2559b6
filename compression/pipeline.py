"""One compression from a model folder to a proven, measured artifact. The reader starts here.

preparing    open the checkpoint, plan, refuse by name, read the texts: nothing is computed before this is clean
calibrating  only where the plan needs data: blocks that go whole, block influence, shared rotary pairs, what the loss
             minds
compressing  the blockwise walk; finished blocks are durable and are not solved again; a search walks several times
quantizing   where the recipe asks for it: a second such walk, over what the first has made
exporting    write the artifact beside its final place, and the foreign formats that were asked for into it
verifying    a fresh process loads it and must compute what we computed; then it appears under its name
evaluating   before and after on text that calibration did not see; then the gate
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from api_schemas.recipe import Recipe
from api_schemas.reports import CompressionReport, MeasuredPair, ReloadProof
from compression.core.block_store import FolderBlockStore, sync_folder
from compression.core.parallel import Group
from compression.core.placement import CPU, placed_on
from compression.core.protocols import NullSink, ProgressSink
from compression.core.streamed_model import StreamedModel
from compression.evaluation import Quality, compare
from compression.exporting import write_result
from compression.judgement import Outcome, build_report, judge
from compression.prepare import Prepared, fingerprint, prepare
from compression.reload import Probed, logits_of, prove, run_probe, too_large_to_run
from compression.search import choose_goal
from compression.stages import Stages
from compression.steps import Made, run_steps

PROOF_TOKENS = 64


def compress(
    recipe: Recipe,
    source: Path,
    target: Path,
    *,
    model: str,
    blocks: Path,
    progress: ProgressSink,
    files: Mapping[str, Path],
    roots: Sequence[Path] | None,
    hub_offline: bool,
    group: Group | None = None,
    device: torch.device = CPU,
) -> CompressionReport:
    """Compress a model folder; the artifact appears at `target` whole and proven, or not at all.

    Args:
        recipe: what to do.
        source: the original model's folder; never written to.
        target: absent; the artifact appears here by rename.
        model: the original's name, for the report.
        blocks: where finished blocks are kept between attempts.
        progress: hears of every stage and block; may raise `Cancelled` between blocks.
        files: stored uploads by id, for text source `upload`.
        roots: folders that text files must lie under; None allows any.
        hub_offline: refuse data sets from the hub.
        group: who shares the calibration; this process is its rank 0, the others call `assist`.
        device: where the walks run, see `core.placement`.

    Raises:
        ModepressError: every refusal and failure, by name; `GateFailed` keeps artifact and report.
    """
    started = time.perf_counter()
    stages = Stages(progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    with stages.stage("preparing", f"reading {model}"):
        ready = prepare(
            recipe, source, target, model, files=files, roots=roots, hub_offline=hub_offline, group=group, device=device
        )
    stages.announce(ready.plan.notes, ready.warnings)
    store = _open_store(recipe, model, ready, blocks)
    with placed_on(device):
        found = choose_goal(recipe, ready, store, stages)
        made = run_steps(found.recipe, found.ready, found.store, stages)
    partial = target.with_name(f".{target.name}.partial")
    with stages.stage("exporting", "writing the artifact"):
        hashes, exports = write_result(recipe, found.ready, made, partial, model)
    with stages.stage("verifying", "reloading the artifact in a fresh process"):
        proof, speed, memory = _verify(recipe, ready, made, partial)
        partial.rename(target)
        sync_folder(target.parent)
    with stages.stage("evaluating", "measuring before and after"):
        compressed = StreamedModel(target, ready.family, device=device)
        quality = _evaluate(ready, compressed, stages)
    outcome = Outcome(
        target,
        compressed,
        made.shapes,
        made.reports,
        hashes,
        exports,
        made.removed,
        proof,
        speed,
        memory,
        quality,
        found.search,
        made.quantization,
    )
    return judge(recipe, build_report(recipe, ready, outcome, stages, time.perf_counter() - started))


def assist(
    recipe: Recipe, source: Path, target: Path, *, model: str, blocks: Path, group: Group, device: torch.device = CPU
) -> None:
    """What a rank other than 0 does: its share of the calibration, every solve, and no file.

    Raises:
        ModepressError: as `compress`; `ranks_disagree` when this rank does not see or compute what rank 0 does.
    """
    ready = prepare(recipe, source, target, model, files={}, roots=None, hub_offline=False, group=group, device=device)
    with placed_on(device):
        run_steps(recipe, ready, _open_store(recipe, model, ready, blocks), Stages(NullSink()))


def _open_store(recipe: Recipe, model: str, ready: Prepared, blocks: Path) -> FolderBlockStore:
    facts = fingerprint(recipe, model, ready)
    ready.share.group.agree(facts.encode(), "what is to be computed (model, recipe, text, versions or threads)")
    return FolderBlockStore(blocks / facts[:32], ready.share.group)


def _verify(
    recipe: Recipe, ready: Prepared, made: Made, partial: Path
) -> tuple[ReloadProof, MeasuredPair, MeasuredPair]:
    """Reload proof, then speed and memory of both models, each in a fresh process of its own."""
    tokens = ready.evaluation.tokens[:1, :PROOF_TOKENS]
    ours = ready.model.placed is not None and ready.model.placed.composite.ours
    project_code = ours or recipe.layout != "portable"
    asked = recipe.evaluation.generation_tokens
    lacking = [too_large_to_run(folder) for folder in (ready.model.folder, partial)]
    wanted = [asked if why is None else 0 for why in lacking]
    after = run_probe(partial, tokens, generate=wanted[1], logits=True, project_code=project_code)
    proof = prove(after, logits_of(made.model, tokens), project_code=project_code)
    before = None
    if wanted[0]:
        before = run_probe(ready.model.folder, tokens, generate=asked, logits=False, project_code=ours)
    reasons = [f"{side}: {why}" for side, why in zip(("before", "after"), lacking, strict=True) if why]
    reason = "; ".join(reasons) if asked else "recipe.evaluation.generation_tokens is 0"
    return proof, *_speed_and_memory(before, after if wanted[1] else None, reason or None)


def _speed_and_memory(
    before: Probed | None, after: Probed | None, reason: str | None
) -> tuple[MeasuredPair, MeasuredPair]:
    speed, memory = (
        [None if side is None else getattr(side, name) for side in (before, after)]
        for name in ("tokens_per_second", "peak_memory_bytes")
    )
    return (
        MeasuredPair(before=speed[0], after=speed[1], reason=reason),
        MeasuredPair(before=memory[0], after=memory[1], reason=reason),
    )


def _evaluate(ready: Prepared, compressed: StreamedModel, stages: Stages) -> Quality:
    blocks = {"before": ready.model.blocks, "after": compressed.blocks}

    def done(side: str, index: int) -> None:
        step = index + (blocks["before"] if side == "after" else 0)
        stages.block(f"evaluated {side}: block {index + 1} of {blocks[side]}", step, sum(blocks.values()))

    return compare(ready.model, compressed, ready.evaluation.tokens, done)
