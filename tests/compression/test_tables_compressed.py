"""TableGPT2 with its encoder is compressed like any decoder among other parts, and reads tables afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from api_schemas.imports import TableGpt2Import
from api_schemas.inference import ChatRequest
from api_schemas.recipe import Recipe
from compression.core.artifact import Result, write_artifact
from compression.importers.tablegpt2 import convert
from compression.reload import logits_of
from preflight.checkpoint import describe, open_checkpoint
from preflight.plans import make_plan
from tests import tiny_tablegpt2 as original
from tests.compression.test_composites import job, run, side, streamed, whole_shapes
from tests.compression.walks import expected_logits, random_tokens, step, walk
from workers.inference.loading import load, plan_load
from workers.inference.prompts import chat_task
from workers.inference.registry import ModelSource

TABLE = {
    "columns": [
        {"name": "a", "dtype": "int64", "values": [3, 1]},
        {"name": "b", "dtype": "object", "values": ["x", "y"]},
    ]
}
ASKED = [{"role": "user", "content": [{"type": "table", "table": TABLE}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    reference = original.random_weights(original.CellTableGPT())
    with torch.no_grad():
        reference.decoder.model.embed_tokens.weight.mul_(0.3)
    source = original.write_original(root / "from", reference, original.cell_config(), "bin")
    convert(TableGpt2Import(family="tablegpt2", folder=str(source)), root / "made")
    return root / "made"


def loaded(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def logits_on_a_table(folder: Path) -> torch.Tensor:
    served = load(plan_load(ModelSource("m", folder, 1.0)))
    task = chat_task(served, ChatRequest.model_validate({"model": "m", "messages": ASKED}))
    assert min(task.prompt) == original.PLACE
    logits: torch.Tensor = served.model(input_ids=torch.tensor([task.prompt]), **task.pictures).logits[0]
    return logits.float()


@torch.inference_mode()
def test_the_walk_runs_the_decoder_as_the_whole_does(folder: Path) -> None:
    tokens = random_tokens(1, 24)
    torch.testing.assert_close(
        logits_of(streamed(folder), tokens), loaded(folder)(tokens).logits[0], rtol=1e-4, atol=1e-3
    )
    facts = describe(open_checkpoint(folder))
    assert [part.name for part in facts.parts] == ["language", "projector", "table_encoder"]
    assert (facts.family, facts.modality, facts.blockers) == ("qwen2", "table-text", ())


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["full", "portable"])
def test_nothing_removed_is_nothing_changed(folder: Path, tmp_path: Path, layout: str) -> None:
    target, shapes = tmp_path / "a", whole_shapes(folder)
    done = walk(folder, step(layout=layout), random_tokens(4, 32), shapes=shapes)
    write_artifact(Result(done.model, done.config, side(folder), done.store, shapes, layout), target, {})
    assert done.model.placed is not None
    before, after = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in done.model.placed.others)
    torch.testing.assert_close(logits_on_a_table(target), logits_on_a_table(folder), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["full", "portable"])
def test_a_narrowed_decoder_is_written_as_it_was_computed(folder: Path, tmp_path: Path, layout: str) -> None:
    target, tokens = tmp_path / "a", random_tokens(4, 32)
    done = walk(folder, step(layout=layout), tokens)
    write_artifact(Result(done.model, done.config, side(folder), done.store, done.method.shapes, layout), target, {})
    written = loaded(target)
    expected = expected_logits(done.model, done.method, done.store, tokens[:1])
    torch.testing.assert_close(written(tokens[:1]).logits[0], expected, rtol=1e-4, atol=1e-3)
    assert written.num_parameters() < loaded(folder).num_parameters()
    assert torch.isfinite(logits_on_a_table(target)).all()
    assert {"tables.json", "table_tokenizer.json", "import_ledger.json"} <= {path.name for path in target.iterdir()}


def test_a_whole_job(folder: Path, tmp_path: Path) -> None:
    steps = [{"method": "modegpt", "sparsity": 0.2, "round_to": 8, "layout": "portable"}]
    report = run(job(steps=steps), folder, tmp_path / "a")
    assert "with compression.runtime" in report.reload.loader
    assert any("what the decoder loses on table tokens is not measured" in one for one in report.warnings)
    assert describe(open_checkpoint(tmp_path / "a")).reads_tables


@pytest.mark.parametrize(
    "quantise", [{"method": "round_to_nearest", "bits": 8, "group_size": None}, {"method": "int8"}]
)
def test_a_quantised_decoder_reads_tables_through_the_same_encoder(
    folder: Path, tmp_path: Path, quantise: dict[str, Any]
) -> None:
    run(job(steps=[quantise]), folder, tmp_path / "a")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    kept = [name for name in before if name.startswith(("table_encoder.", "projector."))]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    dense, quantised = logits_on_a_table(folder), logits_on_a_table(tmp_path / "a")
    error = float((quantised - dense).norm() / dense.norm())
    assert 0 < error < 0.15


def test_what_cannot_be_done_is_named(folder: Path) -> None:
    text = {"source": "file", "path": "/x.jsonl", "num_samples": 4, "sequence_length": 64, "image_field": "image"}
    plan = make_plan(open_checkpoint(folder), job(calibration=text, exports=[{"format": "gguf"}]), model="m")
    found = {blocker.code: blocker.message for blocker in plan.blockers}
    assert "tables stand among the words, and no images" in found["images_not_walked"]
    assert "the other parts of this tablegpt2" in found["export_of_part"]
    sound = make_plan(open_checkpoint(folder), Recipe.model_validate(job().model_dump()), model="m")
    assert {row.runtime: row.status for row in sound.runtimes}["transformers"] == "refused"
