"""A model folder as an ONNX graph for onnxruntime: built from its parts, coded, run, and reported as it runs.

1. every linear is measured in the forms that the settings allow, on calibration text
2. the graph is written with each matrix in the form that was chosen for it
3. onnxruntime runs it: float32 must give the artifact's own logits; of codes perplexity is compared, and where it rises
   too much more linears are held with care, and the graph is written again
4. perplexity on the evaluation text, read as the server reads it, is part of the report

    python -m compression.exporters.onnx FOLDER TARGET [--weights int8] [--calibration FILE] [--evaluation FILE]
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from api_schemas.errors import InvalidRecipe, JobFailed
from api_schemas.export_reports import ExportedOperator, ExportQuality, ExportReport
from api_schemas.exports.onnx import OnnxExport
from compression.core.block_store import write_durably
from compression.core.memory import available_bytes
from compression.core.streamed_model import StreamedModel
from compression.exporters.onnx.assemble import Assembly
from compression.exporters.onnx.choice import Choice, Forms, choose, operators
from compression.exporters.onnx.files import write_graph
from compression.exporters.onnx.sensitivity import CHUNK_TOKENS, Loss, final_logits, measure
from compression.exporters.onnx.texts import Texts
from compression.exporters.source import family_and_layout
from compression.runtime.onnx_session import FACTS, OnnxModel, open_session
from preflight.exports import onnx_refusals

MEASURED_TOKENS = 1024  # of calibration text, on which linears are measured
PROOF_TOKENS = 64
TOLERANCE = 1e-3  # of the largest logit, as in the reload proof
MAX_GRAPHS = 5  # that are written and run until perplexity rises by no more than is allowed
RUNNING_FACTOR = 2  # onnxruntime keeps some weights once more, in its kernels' order


def write_onnx(folder: Path, target: Path, export: OnnxExport, texts: Texts) -> ExportReport:
    """Write a model folder as an ONNX graph, then run it.

    Args:
        folder: an artifact of any layout, or a stock model.
        target: the folder; replaced when it exists. Whole or absent afterwards.
        export: its settings.
        texts: of the model's own tokens.

    Raises:
        InvalidRecipe: codes of `preflight.exports.onnx_refusals`.
        JobFailed: `export_mismatch`: onnxruntime computes another model.
    """
    model = _open(folder)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = _write(model, partial, export, texts)
        facts = {"weights": export.weights, "matrices": written.counts, "runtime": _runtime()}
        write_durably(partial / FACTS, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportReport(
        format="onnx",
        target=f"exports/{target.name}",
        bytes=_bytes(target),
        architecture=str(model.config.architectures[0]),
        tensors=written.counts,
        relative_error=written.weight_error,
        notes=tuple(written.notes),
        quality=written.quality,
        operators=written.operators,
    )


@dataclass(frozen=True)
class _Written:
    counts: dict[str, int]
    weight_error: float
    notes: list[str]
    quality: ExportQuality | None
    operators: tuple[ExportedOperator, ...]


def _open(folder: Path) -> StreamedModel:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, _ = family_and_layout(config)
    for code, why in onnx_refusals(config, family):
        raise InvalidRecipe(code, f"export onnx: {why}", "exports")
    return StreamedModel(folder, family)


def _write(model: StreamedModel, folder: Path, export: OnnxExport, texts: Texts) -> _Written:
    forms, notes = Forms.of(export), list[str]()
    losses: dict[str, Loss] = {}
    if export.weights != "float32":
        losses = measure(model, _sample(texts.calibration), forms.tried, forms.outer)
    choice = choose(model, forms, losses, export.max_error, export.max_error)
    assembly = Assembly(model)
    write_graph(assembly.build(choice.codings), folder)
    runnable = _refuse_memory(folder)
    if runnable is None:
        choice = _until_harmless(assembly, folder, export, forms, losses, texts, choice, notes)
        if export.weights == "float32":
            prove(model, open_session(folder, torch.get_num_threads()), texts.evaluation[:1, :PROOF_TOKENS])
        quality = _judge(folder, texts.evaluation)
    else:
        notes.append(f"it was not run: {runnable}")
        quality = None
    rows = operators(model, choice, losses) if losses else ()
    counts = dict(sorted(Counter(row.coding for row in rows).items())) or {"float32": len(model.tensors)}
    worst = max((loss.weight_errors.get(choice.codings[name], 0.0) for name, loss in losses.items()), default=0.0)
    return _Written(counts, worst, notes, quality, rows)


def _until_harmless(
    assembly: Assembly,
    folder: Path,
    export: OnnxExport,
    forms: Forms,
    losses: Mapping[str, Loss],
    texts: Texts,
    choice: Choice,
    notes: list[str],
) -> Choice:
    """Hold more linears with care and write the graph again, until perplexity rises by no more than is allowed."""
    if forms.careful is None:
        return choice
    model, judged = assembly.model, texts.calibration[-1:]
    (logits,) = final_logits(model, judged)
    before = math.exp(_loss(logits, judged[0, 1:]) / (judged.shape[1] - 1))
    for left in reversed(range(MAX_GRAPHS)):
        after = perplexity(open_session(folder, torch.get_num_threads()), judged)
        notes.append(
            f"limit {choice.limit:.3g}: {len(choice.reasons)} of {len(losses) - 1} linears held with care, perplexity "
            f"on calibration text {before:.3f} → {after:.3f}"
        )
        if after <= before * (1 + export.max_increase) or not left or len(choice.reasons) == len(losses) - 1:
            break
        choice = choose(model, forms, losses, choice.limit / 2, export.max_error)
        write_graph(assembly.build(choice.codings), folder)
    return choice


def _sample(tokens: Tensor) -> Tensor:
    """The first windows, or the beginning of the first."""
    return tokens[: max(1, MEASURED_TOKENS // tokens.shape[1]), :MEASURED_TOKENS]


def prove(model: StreamedModel, graph: OnnxModel, tokens: Tensor) -> None:
    """Compare a float32 graph's logits with those of the model, read at once and in two pieces with a cache.

    Args:
        model: what the graph must compute.
        graph: in onnxruntime.
        tokens: `[1, tokens]`.

    Raises:
        JobFailed: `export_mismatch`.
    """
    (expected,) = final_logits(model, tokens)
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    half = tokens.shape[1] // 2
    whole, _ = graph.read(tokens.numpy())
    _, past = graph.read(tokens[:, :half].numpy())
    rest, _ = graph.read(tokens[:, half:].numpy(), past)
    for read, wanted in ((whole, expected), (rest, expected[half:])):
        difference = float((torch.from_numpy(read[0]) - wanted).abs().max())
        if not difference <= limit:  # a NaN difference fails too
            raise JobFailed(
                "export_mismatch",
                f"export onnx: onnxruntime's logits differ by {difference:.3g} from the artifact's (tolerance "
                f"{limit:.3g})",
            )


def _judge(folder: Path, windows: Tensor) -> ExportQuality:
    found = perplexity(open_session(folder, torch.get_num_threads()), windows)
    if not math.isfinite(found):
        raise JobFailed("export_mismatch", "export onnx: onnxruntime's logits are not finite")
    return ExportQuality(runtime=_runtime(), perplexity=found, tokens=windows.numel())


def perplexity(graph: OnnxModel, windows: Tensor) -> float:
    """Perplexity over positions 1 … T−1 of each window `[windows, tokens]`, which is read in pieces, as prompts are."""
    total = 0.0
    for window in windows:
        past = None
        for start in range(0, len(window), CHUNK_TOKENS):
            piece = window[None, start : start + CHUNK_TOKENS]
            logits, past = graph.read(piece.numpy(), past)
            targets = window[start + 1 : start + 1 + CHUNK_TOKENS]
            total += _loss(torch.from_numpy(logits[0]), targets)
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Sum of the losses in nats of as many tokens `[n]` as there are, of logits `[n or more, vocabulary]`."""
    logs = torch.log_softmax(logits[: len(targets)], dim=-1)
    return -float(logs.gather(1, targets[:, None]).sum(dtype=torch.float64))


def _refuse_memory(folder: Path) -> str | None:
    """Why the graph cannot be run on this machine now; None where it can."""
    needed, available = RUNNING_FACTOR * _bytes(folder), available_bytes()
    return None if needed <= available else f"it would need {needed} bytes of memory, and {available} are available"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _runtime() -> str:
    return f"onnxruntime {onnxruntime.__version__}"
