"""The report of a finished compression, and the gate that judges it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from api_schemas.errors import JobFailed
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from api_schemas.reports import (
    BlockReport,
    CompressionReport,
    CountBeforeAfter,
    ExportReport,
    MeasuredPair,
    ReloadProof,
    SearchReport,
    StepReport,
)
from compression.core.memory import peak_rss_bytes
from compression.core.placement import named
from compression.core.streamed_model import StreamedModel
from compression.evaluation import Quality
from compression.prepare import Prepared, versions
from compression.quantizing import Quantization
from compression.stages import Stages
from preflight.plans import recipe_hash


class GateFailed(JobFailed):
    """The artifact is worse than the recipe allows; it is kept, and so is the report."""

    def __init__(self, message: str, report: CompressionReport) -> None:
        """Carry the report with the failure."""
        super().__init__("quality_gate", message, "recipe.gate.perplexity_increase")
        self.report = report


@dataclass(frozen=True)
class Outcome:
    """What a run has made and measured."""

    target: Path
    compressed: StreamedModel
    shapes: Sequence[BlockShape]
    blocks: Sequence[BlockReport]
    files: dict[str, str]
    exports: Sequence[ExportReport]
    removed: Sequence[int]
    proof: ReloadProof
    speed: MeasuredPair
    memory: MeasuredPair
    quality: Quality
    search: SearchReport | None
    quantization: Quantization | None = None


def build_report(
    recipe: Recipe, ready: Prepared, outcome: Outcome, stages: Stages, seconds: float
) -> CompressionReport:
    """Put together what was planned, made and measured."""
    plan, quality = ready.plan, outcome.quality
    return CompressionReport(
        model=plan.model,
        recipe=recipe,
        recipe_hash=recipe_hash(recipe, plan.model),
        plan=plan,
        shapes=tuple(outcome.shapes),
        perplexity=quality.perplexity,
        divergence=quality.divergence,
        parameters=CountBeforeAfter(before=plan.parameters_before, after=outcome.compressed.parameters),
        block_parameters=CountBeforeAfter(
            before=plan.block_parameters_before,
            after=sum(row.parameters.after for row in outcome.blocks if row.step == len(recipe.steps) - 1),
        ),
        bytes=CountBeforeAfter(before=_weight_bytes(ready.model.folder), after=_weight_bytes(outcome.target)),
        tokens_per_second=outcome.speed,
        peak_memory_bytes=outcome.memory,
        seconds=seconds,
        stage_seconds=stages.seconds,
        ranks=ready.share.group.size,
        device=named(ready.model.device),
        peak_rss_bytes=peak_rss_bytes(),
        calibration=ready.calibration.use,
        evaluation=ready.evaluation.use,
        steps=_steps(recipe, ready, outcome.blocks, len(outcome.removed), _tower_saved(outcome)),
        blocks=tuple(outcome.blocks),
        reload=outcome.proof,
        exports=tuple(outcome.exports),
        codes=None if outcome.quantization is None else outcome.quantization.codes,
        removed_blocks=tuple(outcome.removed),
        search=outcome.search,
        warnings=(*ready.warnings, *_fallbacks(outcome.blocks)),
        files=outcome.files,
        versions=versions(),
        gate_passed=None if recipe.gate is None else _rise(quality) <= recipe.gate.perplexity_increase,
    )


def judge(recipe: Recipe, report: CompressionReport) -> CompressionReport:
    """Return the report, or raise what the recipe's gate says of it.

    Raises:
        GateFailed: perplexity rose by more than the gate allows.
    """
    if recipe.gate is None or report.gate_passed:
        return report
    before, after = report.perplexity.before, report.perplexity.after
    raise GateFailed(
        f"perplexity rose from {before:.3f} to {after:.3f} ({after / before - 1:+.1%}); the gate allows "
        f"{recipe.gate.perplexity_increase:+.1%}. The artifact is kept; lower the sparsity, calibrate on more text, "
        "or widen the gate",
        report,
    )


def _tower_saved(outcome: Outcome) -> int:
    """Bytes that the vision tower lost to codes."""
    return 0 if outcome.quantization is None else outcome.quantization.tower_saved


def _steps(
    recipe: Recipe, ready: Prepared, rows: Sequence[BlockReport], removed: int, tower_saved: int
) -> tuple[StepReport, ...]:
    """Parameters and bytes of the whole model around each step: what is outside the blocks stays as it is.

    Only the vision tower's linears may become codes too, in the last step. Blocks that went whole belong to the first
    step; all blocks of the original are of one size.
    """
    own = [row for row in rows if row.step == 0]
    gone, gone_bytes = removed * own[0].parameters.before, removed * own[0].bytes.before
    parameters = ready.plan.parameters_before - sum(row.parameters.before for row in own) - gone
    outside = ready.plan.bytes_before - sum(row.bytes.before for row in own) - gone_bytes
    reports = []
    for number, step in enumerate(recipe.steps):
        own = [row for row in rows if row.step == number]
        counts = CountBeforeAfter(
            before=parameters + sum(row.parameters.before for row in own) + (0 if number else gone),
            after=parameters + sum(row.parameters.after for row in own),
        )
        size = CountBeforeAfter(
            before=outside + sum(row.bytes.before for row in own) + (0 if number else gone_bytes),
            after=outside + sum(row.bytes.after for row in own) - (tower_saved if step.stage == "quantize" else 0),
        )
        seconds = sum(row.seconds for row in own)
        reports.append(StepReport(method=step.method, parameters=counts, bytes=size, seconds=seconds))
    return tuple(reports)


def _fallbacks(blocks: Sequence[BlockReport]) -> list[str]:
    """What was done another way than asked, each once, with how often."""
    said = Counter((row.step, part.module, part.fallback) for row in blocks for part in row.modules if part.fallback)
    of = Counter(row.step for row in blocks)
    return [f"{part} in {count} of {of[step]} blocks: {why}" for (step, part, why), count in said.items()]


def _rise(quality: Quality) -> float:
    return quality.perplexity.after / quality.perplexity.before - 1


def _weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
