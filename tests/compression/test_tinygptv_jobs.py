"""Whole jobs of method tinygptv: within the budget in stock classes, and mixed with the tower where a class is ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from compression.core.protocols import Cancelled
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan
from tests.compression.test_composites import job
from tests.compression.test_composites import run as run_composite
from tests.compression.test_composition import StopIn, recipe, stored_bytes
from tests.compression.test_pipeline import run
from tests.tiny_composites import make_tiny_composite
from tests.tiny_models import make_tiny_model
from tests.tiny_vision_models import make_tiny_vision_model
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def tinygptv(**settings: Any) -> dict[str, Any]:
    return {"method": "tinygptv", "context_length": 64, **settings}


def least_budget(folder: Path) -> int:
    """The fewest bytes that a budget may be, as the refusal of a smaller one says."""
    plan = make_plan(open_checkpoint(folder), job(steps=[tinygptv(fit_bytes=1000)]), model="m")
    return int(plan.blockers[0].message.split("at least ")[1].split(" ")[0])


def test_a_text_model_fits_its_budget_in_a_stock_class(tmp_path: Path) -> None:
    """Cut in the middle, then resumed: measured once, and chosen as before."""
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, dtype=torch.bfloat16)
    asked = recipe(tinygptv(fit_bytes="410 kB"))
    with pytest.raises(Cancelled):
        run(folder, tmp_path / "out", asked, sink=StopIn("quantizing", 1))
    report = run(folder, tmp_path / "out", asked)
    codes = report.codes
    assert codes is not None
    assert codes.total <= codes.limit == 410_000
    assert codes.weights == stored_bytes(tmp_path / "out") == report.steps[0].bytes.after <= report.plan.bytes_after
    assert not codes.mixes
    assert len({row.bits for row in codes.choices} - {16}) == 1
    for row in codes.choices:
        assert row.bits in {option.bits for option in row.options}
        assert [option.error for option in row.options] == sorted(option.error for option in row.options)
    assert "LlamaForCausalLM (stock" in report.reload.loader
    assert report.parameters.after == report.parameters.before


@torch.inference_mode()
def test_eight_and_four_bits_and_a_tower_in_codes_are_loaded_and_served(tmp_path: Path) -> None:
    """At the least budget all is codes: the tower in 8 bits, linears that 4 bits do not fit in 8, the others in 4."""
    sizes = {**SIZES, "intermediate_size": 96}  # its output linear has 96 inputs, which runs of 64 do not divide
    folder = make_tiny_vision_model(tmp_path / "m", "tinygptv", dtype=torch.bfloat16, text_sizes=sizes)
    least = least_budget(folder)
    report = run_composite(job(steps=[tinygptv(fit_bytes=least)]), folder, tmp_path / "a")
    codes = report.codes
    assert codes is not None
    assert codes.mixes
    assert codes.total == least
    written = open_checkpoint(tmp_path / "a")
    assert codes.weights == report.steps[0].bytes.after == sum(entry.bytes for entry in written.tensors.values())
    assert written.config["quantization_config"]["quant_method"] == "modepress_mixed"
    assert report.parameters.after == report.parameters.before
    assert {row.bits for row in report.codes.choices} == {8, 4}
    assert report.codes.tower_bits == 8
    assert 0 < (report.codes.tower_error or 0) < 0.02
    assert report.reload.max_logit_difference <= report.reload.tolerance
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "a/model.safetensors")
    stays = [name for name in before if name.startswith(("qformer.", "query_tokens", "language_projection."))]
    assert stays
    assert all(before[name].equal(after[name]) for name in stays)
    loaded = load(plan_load(ModelSource("mixed", tmp_path / "a", 1.0)))
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert {"Linear8bitLt", "Linear4bit"} <= kinds
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    want = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).image_inputs(pixels)
    got = loaded.model.image_inputs(pixels.to(loaded.model.dtype)).float()
    assert (got - want).norm() < 0.1 * want.norm()


@torch.inference_mode()
def test_a_native_tower_in_int8_loads_in_the_stock_class(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path / "m", "llava", hidden=48, intermediate=48)  # runs of 64 do not divide these
    least = least_budget(folder)
    report = run_composite(job(steps=[tinygptv(fit_bytes=least)]), folder, tmp_path / "a")
    assert "stock transformers, without" in report.reload.loader
    assert report.codes is not None
    assert report.codes.tower_bits == 8
    assert {row.bits for row in report.codes.choices} == {8}
    stock, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    eights = [name for name, module in stock.named_modules() if type(module).__name__ == "Linear8bitLt"]
    assert {"vision_tower" in name for name in eights} == {True, False}
    assert not any("projector" in name or "lm_head" in name for name in eights)
