"""The resolved list of a quantisation: full paths, bits and bytes; skip lists; sizes that kernels cannot do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from api_schemas.plans import Plan
from tests.preflight.test_quantization import modegpt, plan, refusals
from tests.tiny_composites import make_tiny_composite
from tests.tiny_models import make_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path, "llama", hidden=64, intermediate=192, head_dim=16, dtype=torch.bfloat16)


def rows(made: Plan) -> dict[str, tuple[int | None, int, int]]:
    return {one.module: (one.bits, one.bytes_before, one.bytes_after) for one in made.quantized}


def test_every_linear_is_listed_with_bits_and_bytes(folder: Path) -> None:
    made = rows(plan(folder, {"method": "int8"}))
    assert len(made) == 14
    assert made["model.layers.1.mlp.down_proj"] == (8, 2 * 64 * 192, 64 * 192 + 4 * 64 + 1)
    four = rows(plan(folder, {"method": "nf4"}))
    bits, before, after = four["model.layers.0.mlp.up_proj"]
    assert (bits, before) == (4, 2 * 64 * 192)
    assert 64 * 192 // 2 + 4 * 192 + 64 < after < 64 * 192 // 2 + 4 * 192 + 64 + 100  # and a line of JSON
    assert plan(folder, modegpt(round_to=32)).quantized == ()


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("model.layers.1", 7),
        ("down_proj", 2),
        ("self_attn", 8),
        ("model.layers.0.mlp.gate_proj", 1),
    ],
)
def test_skip_lists_match_whole_words_of_full_paths(folder: Path, entry: str, kept: int) -> None:
    made = plan(folder, {"method": "int8", "skip_modules": [entry]})
    assert made.blockers == ()
    stay = [one for one in made.quantized if one.bits is None]
    assert len(stay) == kept
    assert all(one.kept_by == entry and one.bytes_after == one.bytes_before for one in stay)


@pytest.mark.parametrize("entry", ["layers.11", "proj", "lm_head", "norm", "down_proj.weight"])
def test_entries_that_match_no_linear_are_refused(folder: Path, entry: str) -> None:
    made = plan(folder, {"method": "nf4", "skip_modules": ["down_proj", entry]})
    blocker = next(one for one in made.blockers if one.code == "skip_matches_nothing")
    assert blocker.param == "recipe.steps.0.skip_modules.1"
    assert "model.layers.0.self_attn.q_proj" in blocker.message


def test_a_list_that_leaves_nothing_is_refused(folder: Path) -> None:
    made = plan(folder, {"method": "int8", "skip_modules": ["self_attn", "mlp"]})
    assert "nothing_to_quantize" in refusals(made)


def test_skipped_linears_are_not_asked_for_groups(folder: Path) -> None:
    odd = {"method": "gptq", "group_size": 128}
    assert "group_size_indivisible" in refusals(plan(folder, odd))
    others = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    assert "down_proj" in refusals(plan(folder, {**odd, "skip_modules": others}))["group_size_indivisible"]


def test_sizes_beyond_the_kernels_for_cpus_are_refused_by_name(tmp_path: Path) -> None:
    """As seen by running: inputs in whole runs, outputs in thirty-twos; int8 takes any size."""
    odd = make_tiny_model(tmp_path, "llama", hidden=64, intermediate=176, head_dim=16, kv_heads=1)
    found = [(one.code, one.message) for one in plan(odd, {"method": "nf4"}).blockers]
    assert any(
        "mlp.down_proj would have 176 inputs" in said for code, said in found if code == "block_size_indivisible"
    )
    for said in ("self_attn.k_proj would have 16 outputs", "mlp.up_proj would have 176 outputs"):
        assert any(said in message for code, message in found if code == "outputs_indivisible")
    named = plan(odd, {"method": "nf4", "skip_modules": ["mlp", "k_proj", "v_proj"]})
    assert named.blockers == ()
    assert plan(odd, {"method": "int8"}).blockers == ()


def test_widths_that_the_data_choose_are_judged_by_what_divides_them(folder: Path) -> None:
    by_data = modegpt(layout="full", allocation="block_influence", modules=["mlp"])
    found = refusals(plan(folder, {**by_data, "round_to": 8}, {"method": "nf4"}))
    assert "some multiple of 8" in found["block_size_indivisible"] + found["outputs_indivisible"]
    assert plan(folder, {**by_data, "round_to": 64}, {"method": "nf4"}).blockers == ()
    assert plan(folder, {**by_data, "round_to": 8}, {"method": "int8"}).blockers == ()


def test_fused_linears_are_one_and_cannot_share_double_scales(tmp_path: Path) -> None:
    fused = make_tiny_model(tmp_path, "phi3", hidden=64, intermediate=64, head_dim=16)
    made = plan(fused, {"method": "nf4"})
    assert made.blockers == ()
    assert {one.module for one in made.quantized if ".0." in one.module} == {
        f"model.layers.0.{name}"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    double = {"method": "nf4", "double_quantization": True}
    assert "layout 'full'" in refusals(plan(fused, double))["double_quantization_of_fused"]
    assert plan(fused, modegpt(layout="full", modules=["mlp"], round_to=64), double).blockers == ()


def test_paths_in_a_composite_are_those_on_disk(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path, "llava", intermediate=64)
    made = plan(folder, {"method": "int8", "skip_modules": ["language_model.model.layers.0"]})
    assert {one.kept_by is None for one in made.quantized} == {True, False}
    assert not any("vision" in one.module or "projector" in one.module for one in made.quantized)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outlier_threshold": -1.0}, "greater than or equal to 0"),
        ({"bits": 4}, "Extra inputs"),
        ({"skip_modules": ["a b"]}, "match pattern"),
        ({"skip_modules": [".mlp"]}, "match pattern"),
    ],
)
def test_settings_are_checked(folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(folder, {"method": "int8", **settings})
