"""ONNX graphs: the same model to onnxruntime, with a cache and without; operators held with care where codes harm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from api_schemas.errors import InvalidRecipe, JobFailed
from api_schemas.exports.onnx import OnnxExport
from api_schemas.recipe import Recipe
from api_schemas.reports import ExportReport
from compression.core.streamed_model import StreamedModel
from compression.exporters.onnx.__main__ import main
from compression.exporters.onnx.export import prove, write_onnx
from compression.exporters.onnx.texts import Texts
from compression.runtime.onnx_session import DATA, GRAPH, OnnxModel, open_session
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.plans import make_plan
from tests.compression.core.test_artifact import portable_walk, write
from tests.compression.test_nemotron import NEMOTRON
from tests.compression.test_pipeline import recipe, run
from tests.compression.walks import random_tokens, step, walk
from tests.tiny_models import make_tiny_model

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tied": True, "kv_heads": 1, "bias": True}),
    ("mistral", {"sliding_window": 6, "kv_heads": 4}),
    ("qwen3", {}),
    ("granite", {}),
    ("smollm3", {}),
    ("phi3", {}),
    ("phi", {}),
    ("opt", {}),
    ("gpt2", {"tied": True}),
    ("gpt_neox", {}),
    ("gemma2", {"tied": True}),
    ("gemma3_text", {}),
]


def texts(seed: int = 1) -> Texts:
    return Texts(random_tokens(2, 48, seed=seed), random_tokens(2, 48, seed=seed + 1))


def export(folder: Path, target: Path, weights: str = "float32", **settings: Any) -> ExportReport:
    return write_onnx(folder, target, OnnxExport(format="onnx", weights=weights, **settings), texts())  # type: ignore[arg-type]


def greedy(graph: OnnxModel, prompt: torch.Tensor, count: int) -> list[int]:
    logits, past = graph.read(prompt.numpy(), first_logit=-1)
    written = [int(logits[0, -1].argmax())]
    while len(written) < count:
        logits, past = graph.read(np.array([[written[-1]]]), past, first_logit=-1)
        written.append(int(logits[0, -1].argmax()))
    return written


def assert_same_model(folder: Path, exported: Path) -> None:
    """Logits at once, in pieces, and of the last token alone; then a greedy continuation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    graph, tokens = open_session(exported, threads=1), random_tokens(1, 40, seed=9)
    with torch.inference_mode():
        expected = model(tokens).logits.numpy()
        written = model.generate(tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        again = model(written).logits[0, 39:-1].argmax(-1).tolist()
    whole, _ = graph.read(tokens.numpy())
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)
    past, pieces = None, []
    for start, end in ((0, 7), (7, 8), (8, 40)):
        logits, past = graph.read(tokens[:, start:end].numpy(), past)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=0, atol=1e-4)
    last, _ = graph.read(tokens.numpy(), first_logit=-1)
    assert last.shape[1] == 1
    np.testing.assert_allclose(last[0, 0], expected[0, -1], rtol=0, atol=1e-4)
    ours = greedy(graph, tokens, 12)
    assert ours[0] == int(expected[0, -1].argmax())
    if model.config.eos_token_id not in ours:  # which transformers was told not to write
        assert ours == written[0, 40:].tolist() == again


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ExportReport]:
    """A model, its float32 graph, and what was said of it."""
    root = tmp_path_factory.mktemp("onnx")
    folder = make_tiny_model(root / "in", "llama")
    return folder, root / "onnx", export(folder, root / "onnx")


@pytest.mark.parametrize(("kind", "settings"), FAMILIES)
def test_onnxruntime_computes_the_same_model(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    report = export(folder, tmp_path / "onnx")
    assert_same_model(folder, tmp_path / "onnx")
    assert report.relative_error == 0.0
    parameters = sum(entry.parameters for entry in open_checkpoint(folder).tensors.values())
    stored = (tmp_path / "onnx" / DATA).stat().st_size
    assert stored <= parameters * 4 + 64 * 100  # a tied head is there once


@pytest.mark.parametrize("layout", ["portable", "full"])
def test_compressed_models_are_exported_too(tmp_path: Path, layout: str) -> None:
    """Fewer rotary pairs: one set of them in `portable`, another in each head in `full`."""
    folder = make_tiny_model(tmp_path / "in", "llama", head_dim=16)
    done = portable_walk(folder) if layout == "portable" else walk(folder, step(layout="full"), random_tokens(8, 32))
    write(done, folder, tmp_path / "out", layout)
    export(tmp_path / "out", tmp_path / "onnx")
    assert_same_model(tmp_path / "out", tmp_path / "onnx")


def test_several_texts_of_one_length_are_read_together(plain: tuple[Path, Path, ExportReport]) -> None:
    graph, tokens = open_session(plain[1], threads=1), random_tokens(3, 9, seed=4).numpy()
    empty = [np.repeat(one, 3, axis=0) for one in graph.empty]
    together, _ = graph.read(tokens, empty)
    for row in range(3):
        alone, _ = graph.read(tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-5)


def test_perplexity_is_that_of_what_will_be_served(plain: tuple[Path, Path, ExportReport]) -> None:
    """Of float32 it is transformers' own; names are the ones that other readers of such graphs look for."""
    folder, exported, report = plain
    said = texts()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(said.evaluation).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), said.evaluation[:, 1:].flatten())
    assert report.quality is not None
    assert report.quality.perplexity == pytest.approx(float(losses.exp()), rel=1e-5)
    assert report.quality.tokens == said.evaluation.numel()
    graph = onnx.load(exported / GRAPH, load_external_data=False).graph
    assert [one.name for one in graph.input][:3] == ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert [one.name for one in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert str(folder.parent) not in (exported / GRAPH).read_text(errors="ignore")


def test_another_models_graph_is_no_proof(plain: tuple[Path, Path, ExportReport], tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path, "llama", seed=1)
    model = StreamedModel(other, resolve(json.loads((other / "config.json").read_text())))
    with pytest.raises(JobFailed, match="logits differ") as caught:
        prove(model, open_session(plain[1], threads=1), random_tokens(1, 20))
    assert caught.value.code == "export_mismatch"


def outlier(folder: Path, loud: float = 1000.0) -> Path:
    """A model of which one unit of one MLP is so much louder than the others, and as much less heard."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[5] *= loud
        mlp.down_proj.weight[:, 5] /= loud
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("loud", "coding"), [(30.0, "8-bit weights, one scale per 32"), (1000.0, "float32")])
def test_an_operator_that_codes_would_harm_is_found_and_held_with_care(
    tmp_path: Path, loud: float, coding: str
) -> None:
    folder = outlier(make_tiny_model(tmp_path / "in", "llama", tied=True, hidden=64, intermediate=96), loud)
    report = export(folder, tmp_path / "onnx", "int8", inputs="tensor")
    rows = {row.name: row for row in report.operators}
    assert {name for name, row in rows.items() if row.reason} == {"model.layers.1.mlp.down_proj"}
    worst = rows["model.layers.1.mlp.down_proj"]
    assert worst.reason is not None
    assert "the limit is 0.05" in worst.reason
    assert worst.coding == coding
    assert worst.relative_error is not None
    assert worst.relative_error <= 0.05
    assert rows["model.layers.0.mlp.down_proj"].coding.startswith("int8, inputs coded at run time")
    assert "lm_head" not in rows  # it is the embedding's own codes
    matrices = sum(row.bytes for row in report.operators)
    assert matrices < report.bytes
    assert (tmp_path / "onnx" / DATA).stat().st_size < matrices + 8000


def test_limits_are_lowered_until_perplexity_rises_no_more_than_allowed(tmp_path: Path) -> None:
    folder = outlier(make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=96))
    report = export(folder, tmp_path / "onnx", "int8", inputs="tensor", max_error=0.9, max_increase=1e-9)
    tried = [note for note in report.notes if note.startswith("limit ")]
    assert len(tried) > 1
    limits = [float(note.split(":")[0].removeprefix("limit ")) for note in tried]
    assert limits == pytest.approx([0.9 / 2**number for number in range(len(tried))], rel=0.01)
    counts = [int(note.split(": ")[1].split()[0]) for note in tried]
    assert counts[0] == 1  # the loud one, 0.97
    assert counts == sorted(counts)
    assert sum(row.reason is not None for row in report.operators) == counts[-1]


@pytest.mark.parametrize(("weights", "settings"), [("int8", {"inputs": "block"}), ("int4", {"block": 16})])
def test_weights_in_blocks(tmp_path: Path, weights: str, settings: dict[str, Any]) -> None:
    """Sizes that no block divides are filled up; head and embedding of a model without a tie are both coded."""
    folder = make_tiny_model(tmp_path / "in", "qwen2", hidden=40, head_dim=10, intermediate=72)
    report = export(folder, tmp_path / "onnx", weights, **settings)
    coding = {"int8": "8-bit weights, one scale per 32", "int4": "4-bit weights, one scale per 16"}[weights]
    outer = coding.replace("4-bit", "8-bit")
    rows = {row.name: row.coding for row in report.operators}
    assert {rows.pop("model.embed_tokens"), rows.pop("lm_head")} == {outer}
    assert set(rows.values()) == {coding}
    exact = export(folder, tmp_path / "float32")
    assert report.quality is not None
    assert exact.quality is not None
    assert report.bytes < exact.bytes
    assert report.quality.perplexity == pytest.approx(
        exact.quality.perplexity, rel={"int8": 0.05, "int4": 0.5}[weights]
    )


@pytest.mark.parametrize(
    ("kind", "settings", "code"),
    [
        ("mixtral", {}, "onnx_experts"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "onnx_rotary"),
    ],
)
def test_what_no_graph_can_say_is_refused_in_the_plan(tmp_path: Path, kind: Any, settings: Any, code: str) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    asked = recipe(exports=[{"format": "onnx"}])
    found = {blocker.code: blocker for blocker in make_plan(open_checkpoint(folder), asked, model="tiny").blockers}
    assert found[code].param == "recipe.exports.0"
    with pytest.raises(InvalidRecipe) as caught:
        export(folder, tmp_path / "onnx")
    assert caught.value.code == code


def test_the_plan_counts_the_graphs_bytes(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=128)
    checkpoint = open_checkpoint(folder)
    plain, *exported = (
        make_plan(checkpoint, recipe(exports=[{"format": "onnx", "weights": kind}] if kind else []), model="tiny")
        for kind in (None, "int4", "int8", "float32")
    )
    added = [plan.disk_bytes - plain.disk_bytes for plan in exported]
    assert added == sorted(added)
    assert added[2] == plain.parameters_after * 4
    assert {row.runtime: row.status for row in exported[1].runtimes}["onnxruntime"] == "verified"


def test_a_job_writes_judges_and_seals_the_graph(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", tied=True, hidden=64, intermediate=96)
    asked: Recipe = recipe(NEMOTRON, exports=[{"format": "onnx"}])
    report = run(folder, tmp_path / "out", asked)
    (written,) = report.exports
    assert written.target == "exports/onnx-int8"
    assert written.quality is not None
    assert written.quality.perplexity == pytest.approx(report.perplexity.after, rel=0.05)
    inside = {"exports/onnx-int8/model.onnx", "exports/onnx-int8/model.onnx.data", "exports/onnx-int8/export.json"}
    assert inside <= report.files.keys()
    assert open_checkpoint(tmp_path / "out").tensors  # what lies in it is no hindrance to loading or registering it


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    more = ["--weights", "int4", "--windows", "1", "--sequence-length", "32"]
    assert main([str(folder), str(tmp_path / "onnx"), *more]) == 0
    assert ExportReport.model_validate_json(capsys.readouterr().out).format == "onnx"
    assert main([str(make_tiny_model(tmp_path / "experts", "mixtral")), str(tmp_path / "no"), *more]) == 1
    assert "onnx_experts" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
