"""What was imported is a model like any other: walked, narrowed, quantised, reloaded, and refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from api_schemas.imports import ArtGpt4Import, MiniGpt4Import, TinyGptvImport
from compression.core.artifact import Result, write_artifact
from compression.importers import artgpt4, minigpt4, tinygptv
from compression.importers.ledger import FILE
from compression.reload import logits_of
from preflight.checkpoint import describe, open_checkpoint
from preflight.plans import make_plan
from tests.compression.importers import artgpt4_originals, tinygptv_originals
from tests.compression.test_composites import job, run, side, stock, streamed, whole_shapes
from tests.compression.walks import expected_logits, random_tokens, step, walk
from tests.image_chat_originals import IMAGE, QUERIES
from tests.picture_rows import mixed_rows, write_rows

FAMILIES = ["tinygptv", "minigpt4"]


def imported(folder: Path, family: str) -> Path:
    if family == "tinygptv":
        originals = tinygptv_originals.write_originals(folder)
        convert: Any = (TinyGptvImport, tinygptv.convert)
    else:
        originals = artgpt4_originals.write_originals(folder, "minigpt4-q_former")
        convert = (MiniGpt4Import, minigpt4.convert)
    request = {"family": family, **{role: str(path) for role, path in originals.paths.items()}, **originals.options}
    convert[1](convert[0].model_validate(request), folder / "model")
    return folder / "model"


def pictured(folder: Path) -> dict[str, torch.Tensor]:
    """Words, an image, words."""
    generator = torch.Generator().manual_seed(3)
    words = random_tokens(1, 12)[0]
    marks = torch.full((QUERIES,), stock(folder).config.image_token_id)
    pixels = torch.randn(1, 3, IMAGE, IMAGE, generator=generator)
    return {"input_ids": torch.cat((words[:6], marks, words[6:]))[None], "pixel_values": pixels}


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_runs_the_decoder_as_the_whole_does(tmp_path: Path, family: str) -> None:
    folder = imported(tmp_path, family)
    tokens = random_tokens(1, 24)
    torch.testing.assert_close(
        logits_of(streamed(folder), tokens), stock(folder)(tokens).logits[0], rtol=1e-4, atol=1e-4
    )
    facts = describe(open_checkpoint(folder))
    assert [part.name for part in facts.parts] == ["language", "projector", "vision"]
    assert facts.blockers == ()
    assert facts.reads_images


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["full", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_removed_is_nothing_changed(tmp_path: Path, family: str, layout: str) -> None:
    folder, target = imported(tmp_path, family), tmp_path / "a"
    shapes = whole_shapes(folder)
    done = walk(folder, step(layout=layout), random_tokens(4, 32), shapes=shapes)
    write_artifact(Result(done.model, done.config, side(folder), done.store, shapes, layout), target, {})
    assert done.model.placed is not None
    before, after = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    for name in done.model.placed.others:
        assert torch.equal(before[name], after[name])
    inputs = pictured(folder)
    torch.testing.assert_close(stock(target)(**inputs).logits, stock(folder)(**inputs).logits, rtol=1e-3, atol=1e-3)
    assert (target / FILE).is_file()


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["full", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrowed_decoder_is_written_as_it_was_computed(tmp_path: Path, family: str, layout: str) -> None:
    folder, target, tokens = imported(tmp_path, family), tmp_path / "a", random_tokens(4, 32)
    done = walk(folder, step(layout=layout), tokens)
    write_artifact(Result(done.model, done.config, side(folder), done.store, done.method.shapes, layout), target, {})
    written = stock(target)
    expected = expected_logits(done.model, done.method, done.store, tokens[:1])
    torch.testing.assert_close(written(tokens[:1]).logits[0], expected, rtol=1e-4, atol=1e-4)
    assert written.num_parameters() < stock(folder).num_parameters()
    torch.testing.assert_close(
        written.image_inputs(pictured(folder)["pixel_values"]),
        stock(folder).image_inputs(pictured(folder)["pixel_values"]),
    )


def test_a_whole_job_calibrated_on_images(tmp_path: Path) -> None:
    """Refined, through attention's own norm; the proof loads it in a process that may import the runtime."""
    folder = imported(tmp_path, "tinygptv")
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(40))
    text = {"source": "file", "path": str(rows), "num_samples": 6, "sequence_length": 64, "image_field": "image"}
    steps = [{"method": "modegpt", "sparsity": 0.2, "round_to": 8, "layout": "full"}]
    report = run(job(steps=steps, calibration=text), folder, tmp_path / "a")
    assert "with compression.runtime" in report.reload.loader
    assert report.calibration.image_tokens == QUERIES * report.calibration.images > 0
    assert open_checkpoint(tmp_path / "a").config["model_type"] == "modepress_tinygptv"


def art(folder: Path) -> Path:
    originals = artgpt4_originals.write_originals(folder, "artgpt4-code")
    request = {"family": "artgpt4", **{role: str(path) for role, path in originals.paths.items()}, **originals.options}
    artgpt4.convert(ArtGpt4Import.model_validate(request), folder / "model")
    return folder / "model"


def test_a_bottleneck_on_the_stream_is_refused_in_the_plan_of_what_removes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(art(tmp_path))
    assert describe(checkpoint).blockers == ()
    blockers = make_plan(checkpoint, job(), model="m").blockers
    assert [(one.code, one.param) for one in blockers] == [("unsupported_architecture", "recipe.steps.0.method")]
    assert "bottleneck" in blockers[0].message


@torch.inference_mode()
def test_the_walk_goes_through_the_bottleneck_once(tmp_path: Path) -> None:
    folder, tokens = art(tmp_path), random_tokens(1, 24)
    wanted = stock(folder)(tokens).logits[0]
    torch.testing.assert_close(logits_of(streamed(folder), tokens), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skipped", [[], ["adapter"]])
def test_the_bottleneck_is_quantised_with_the_rest_unless_it_is_skipped(tmp_path: Path, skipped: list[str]) -> None:
    steps = [{"method": "round_to_nearest", "bits": 8, "group_size": None, "skip_modules": skipped}]
    plan = make_plan(open_checkpoint(art(tmp_path)), job(steps=steps), model="m")
    assert plan.blockers == ()
    run(job(steps=steps), tmp_path / "model", tmp_path / "a")
    packed = [name for name in open_checkpoint(tmp_path / "a").tensors if name.endswith("weight_packed")]
    assert sum(".adapter." in name for name in packed) == (0 if skipped else 2 * artgpt4_originals.BLOCKS)
    assert sum(".q_proj." in name for name in packed) == artgpt4_originals.BLOCKS


def test_the_plan_says_who_loads_the_result(tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(imported(tmp_path, "tinygptv")), job(), model="m")
    assert plan.blockers == ()
    verdicts = {row.runtime: row.status for row in plan.runtimes}
    assert verdicts["modepress"] == "verified"
    assert verdicts["transformers"] == "refused"


def test_a_narrowed_decoder_is_quantised_and_nothing_else_is(tmp_path: Path) -> None:
    folder = imported(tmp_path, "tinygptv")
    steps = [
        {"method": "modegpt", "sparsity": 0.2, "round_to": 32, "modules": ["mlp"]},
        {"method": "gptq", "bits": 8, "group_size": 32},
    ]
    run(job(steps=steps), folder, tmp_path / "a")
    written = open_checkpoint(tmp_path / "a")
    packed = {name for name in written.tensors if name.endswith("weight_packed")}
    assert packed
    assert all(name.startswith("language_model.model.layers.") for name in packed)
