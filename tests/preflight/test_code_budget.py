"""Budgets of method tinygptv: what is counted, what is refused, and the arithmetic on the real TinyGPT-V."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import compression.runtime  # noqa: F401 (registers TinyGPT-V)
from api_schemas.methods import TinygptvConfig
from api_schemas.plans import BlockShape, Plan
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint
from preflight.composites import place
from preflight.families import table
from preflight.memory_needs import needs
from preflight.plans import make_plan
from preflight.safetensors_header import TensorEntry
from preflight.tokenizer_files import TokenizerFacts
from tests.preflight.test_quantization import modegpt, plan, refusals
from tests.tiny_composites import make_tiny_composite
from tests.tiny_models import make_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path, "llama", hidden=64, intermediate=192, head_dim=16, dtype=torch.bfloat16)


def asked(**settings: Any) -> dict[str, Any]:
    return {"method": "tinygptv", "context_length": 64, **settings}


def test_keys_values_and_activations_are_counted_for_the_context() -> None:
    size = table("llama").dimensions(
        {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"num_hidden_layers": 3, "vocab_size": 1000, "head_dim": 16}
    )
    shapes = (BlockShape(mlp_width=192, query_key_rank=16, value_output_rank=12),) * 3
    found = needs(size, shapes, 100, None)
    assert found.cache == 3 * 100 * 2 * (16 + 12) * 2
    assert needs(size, shapes, 200, None).cache == 2 * found.cache
    assert found.activations == 100 * ((6 * 64 + 3 * 192) * 2 + 64) + 4 * 1000
    tower = {"image_size": 448, "patch_size": 14, "hidden_size": 1408, "intermediate_size": 6144}
    seen = needs(size, shapes, 100, tower)
    assert seen.activations == 1025 * (6 * 1408 + 3 * 6144) * 2 + 4 * 1000


def test_too_small_and_too_large_budgets_are_refused_with_what_is_needed(folder: Path) -> None:
    small = refusals(plan(folder, asked(fit_bytes=1000)))["budget_unreachable"]
    least = int(small.split("at least ")[1].split(" ")[0])
    assert "budget_unreachable" not in refusals(plan(folder, asked(fit_bytes=least)))
    assert "budget_unreachable" in refusals(plan(folder, asked(fit_bytes=least - 1)))
    large = refusals(plan(folder, asked(device="4GB")))["budget_already_met"]
    needed = int(large.split("(")[1].split(" ")[0])
    assert "budget_already_met" in refusals(plan(folder, asked(fit_bytes=needed)))
    assert refusals(plan(folder, asked(fit_bytes=needed - 1))) == {}


def test_the_plan_lists_the_fewest_bits_and_counts_the_most_bytes(folder: Path) -> None:
    made = plan(folder, asked(fit_bytes="400 kB"))
    assert made.blockers == ()
    assert any("bytes are left for weights" in note for note in made.notes)
    assert len(made.quantized) == 14
    assert {one.bits for one in made.quantized} == {4}
    beside = 400_000 - made.bytes_after
    assert beside > 0
    assert made.bytes_after < made.bytes_before
    kept = plan(folder, asked(fit_bytes="400 kB", skip_modules=["down_proj"]))
    assert sum(one.kept_by == "down_proj" for one in kept.quantized) == 2


def test_preset_paper_is_exact(folder: Path) -> None:
    made = plan(folder, {"method": "tinygptv", "preset": "paper"})
    same = plan(folder, {"method": "int8"})
    assert made.bytes_after == same.bytes_after
    assert [one.bits for one in made.quantized] == [8] * 14
    narrow = plan(folder, modegpt(round_to=32), {"method": "tinygptv", "preset": "paper"})
    assert narrow.bytes_after < made.bytes_after


def test_codes_mix_where_no_stock_class_loads_the_result(folder: Path) -> None:
    said = " ".join(plan(folder, asked(fit_bytes="400 kB")).notes)
    assert "8 or 16 bits, or 4 or 16" in said
    full = modegpt(layout="full", modules=["mlp"], round_to=64)
    assert "4, 8 or 16 bits" in " ".join(plan(folder, full, asked(fit_bytes="300 kB")).notes)


def test_rules_follow_a_part_s_role(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path, "llava", hidden=64, intermediate=64)
    listed = {one.module: one.bits for one in plan(folder, asked(fit_bytes="500 kB")).quantized}
    tower = [name for name in listed if "vision_tower" in name]
    assert tower
    assert all(".layers." in name for name in tower)
    assert not any("projector" in name or "embed" in name or "norm" in name for name in listed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exactly one of fit_bytes"),
        ({"fit_bytes": "8 GB", "device": "8GB"}, "exactly one of fit_bytes"),
        ({"preset": "paper", "device": "8GB"}, "device belongs to preset 'budget'"),
        ({"fit_bytes": "8 gigs"}, "must be a number and one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TinygptvConfig.model_validate({"method": "tinygptv", **settings})


def real_tinygptv() -> Checkpoint:
    """The real shapes (448 pixels, Phi-2, EVA ViT-g, a Q-Former of 12 layers) in 16 bits, from the meta device."""
    text = {"model_type": "tinygptv_phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200, "tie_word_embeddings": False}
    vision = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
    vision |= {"image_size": 448, "patch_size": 14, "qkv_bias": True}
    config = AutoConfig.for_model(
        "tinygptv",
        text_config=text,
        vision_config=vision,
        qformer_config={"encoder_hidden_size": 1408},
        num_query_tokens=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    entries = {
        name: TensorEntry(name, "BF16", tuple(one.shape), Path("model.safetensors"), 0, 2 * one.numel())
        for name, one in model.state_dict().items()
        if one.is_floating_point()
    }
    whole = config.to_dict() | {"architectures": [type(model).__name__]}
    placed = place(whole, entries)
    tokenizer = TokenizerFacts(present=True, has_chat_template=True, largest_id=50294)
    return Checkpoint(Path("real"), whole, entries, (), tokenizer, placed=placed)


def planned(checkpoint: Checkpoint, step: dict[str, Any]) -> Plan:
    recipe = Recipe.model_validate({"steps": [{"method": "tinygptv", **step}]})
    return make_plan(checkpoint, recipe, model="TinyGPT-V")


def test_the_real_shapes_fit_below_the_paper_s_5_6_gb_by_counted_bytes() -> None:
    """families.md counts 5.56 + 1.97 + 0.24 GB in 16 bits; the paper's setting leaves 5.6 GB of weights."""
    checkpoint = real_tinygptv()
    paper = planned(checkpoint, {"preset": "paper"})
    assert paper.bytes_before == pytest.approx(7.77e9, rel=0.01)
    assert paper.bytes_after == pytest.approx(5.25e9, rel=0.01)  # LoRA merged, all but the ViT's norms in 16 bits
    fit = planned(checkpoint, {"fit_bytes": "5.6 GB"})
    assert fit.blockers == ()
    assert fit.bytes_after < 5.0e9  # with keys, values and activations of 2,048 tokens in the 5.6 GB
    least = planned(checkpoint, {"fit_bytes": "1 GB"}).blockers[0].message
    needed = int(least.split("at least ")[1].split(" ")[0])
    assert needed < 4.2e9
    assert planned(checkpoint, {"device": "6GB"}).blockers == ()
