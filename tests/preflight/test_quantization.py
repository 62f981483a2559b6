"""Plans with a quantisation: what cannot be grouped, packed or loaded is refused by name before anything is read."""

from pathlib import Path
from typing import Any

import pytest

from api_schemas.plans import Plan
from api_schemas.recipe import Recipe
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan
from tests.tiny_models import make_tiny_model


def plan(folder: Path, *steps: dict[str, Any], **settings: Any) -> Plan:
    asked = Recipe.model_validate({"steps": steps, **settings})
    return make_plan(open_checkpoint(folder), asked, model="tiny")


def refusals(made: Plan) -> dict[str, str]:
    return {blocker.code: blocker.message for blocker in made.blockers}


def modegpt(**settings: Any) -> dict[str, Any]:
    return {"method": "modegpt", "mode": "reference", "sparsity": 0.3, **settings}


def gptq(**settings: Any) -> dict[str, Any]:
    return {"method": "gptq", "group_size": 32, **settings}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path, "llama", hidden=64, intermediate=256)


def test_widths_that_groups_do_not_divide_are_refused_with_the_linear_and_the_width(folder: Path) -> None:
    """T15."""
    made = plan(folder, modegpt(round_to=8), gptq(group_size=32))
    blocker = next(one for one in made.blockers if one.code == "group_size_indivisible")
    assert blocker.param == "recipe.steps.1.group_size"
    assert f"mlp.down_proj would have {made.blocks[0].mlp_width} inputs" in blocker.message
    assert "round_to" in blocker.message
    assert plan(folder, modegpt(round_to=32), gptq(group_size=32)).blockers == ()
    assert plan(folder, modegpt(round_to=8), gptq(group_size=None)).blockers == ()


def test_widths_that_the_data_choose_are_judged_by_what_divides_them_all(folder: Path) -> None:
    by_data = modegpt(layout="full", allocation="block_influence", modules=["mlp"])
    assert "some multiple of 8" in refusals(plan(folder, {**by_data, "round_to": 8}, gptq()))["group_size_indivisible"]
    assert plan(folder, {**by_data, "round_to": 32}, gptq()).blockers == ()


def test_rows_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    odd = make_tiny_model(tmp_path, "llama", hidden=64, intermediate=36)
    assert "8 to a word" in refusals(plan(odd, gptq(group_size=None)))["not_packable"]
    assert plan(odd, gptq(group_size=None, bits=8)).blockers == ()


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_stock_classes_without_ordinary_linears_need_layout_full(tmp_path: Path, kind: Any) -> None:
    folder = make_tiny_model(tmp_path, kind, hidden=32, intermediate=64)
    assert "layout 'full'" in refusals(plan(folder, gptq()))["stock_cannot_unpack"]
    full = plan(folder, modegpt(layout="full", round_to=32, modules=["mlp"]), gptq())
    assert "stock_cannot_unpack" not in refusals(full)


def test_exports_of_codes_are_refused(folder: Path) -> None:
    made = plan(folder, gptq(), exports=[{"format": "gguf"}])
    assert "leave out the one or the other" in refusals(made)["export_of_codes"]


def test_a_packed_model_is_not_compressed_again(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    assert "already_quantized" in refusals(plan(folder, gptq()))


def test_both_steps_count_in_time_memory_and_disk(folder: Path) -> None:
    one, both = plan(folder, modegpt(round_to=32)), plan(folder, modegpt(round_to=32), gptq())
    assert both.flops == pytest.approx(one.flops + both.steps[1].flops)
    assert both.estimated_seconds > one.estimated_seconds
    assert both.peak_memory_bytes > one.peak_memory_bytes
    assert both.bytes_after < one.bytes_after
    near = plan(folder, {"method": "round_to_nearest", "group_size": 32})
    assert near.flops < plan(folder, gptq()).flops
    assert near.sparsity_requested == near.sparsity_planned == 0


def test_runtimes_say_what_unpacks_and_what_a_cpu_refuses(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", hidden=64, intermediate=144, head_dim=8)
    rows = {one.runtime: one for one in plan(folder, gptq(group_size=None)).runtimes}
    assert set(rows) == {"modepress", "transformers", "vllm"}
    assert "compressed-tensors" in rows["transformers"].reason
    assert rows["vllm"].status == "believed"
    assert "GPU only" not in rows["vllm"].reason  # 64 + 2·16 … 288 outputs
    other = make_tiny_model(tmp_path / "b", "llama", hidden=64, intermediate=136, head_dim=8)
    said = next(one for one in plan(other, gptq(group_size=None)).runtimes if one.runtime == "vllm")
    assert "there are 272: GPU only" in said.reason


def test_a_target_in_bytes_does_not_go_before_codes(folder: Path) -> None:
    step = {"method": "modegpt", "mode": "reference", "round_to": 32}
    by_bytes = plan(folder, {**step, "target": {"bytes": 400_000}}, gptq())
    assert "target in parameters" in refusals(by_bytes)["target_before_codes"]
    by_parameters = plan(folder, {**step, "target": {"parameters": 130_000}}, gptq())
    assert "target_before_codes" not in refusals(by_parameters)
