"""Widths and counts: parameters counted from shapes are those transformers builds; budgets are met."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from api_schemas.errors import InvalidCheckpoint, InvalidRecipe
from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from compression.runtime.blocks import resize_block_
from preflight.families import known_families, resolve, table
from preflight.safetensors_header import read_header
from preflight.shapes import block_costs, dense_shape, most_removable, shapes_for, width_choices
from tests.tiny_models import MULTI_HEAD_ONLY, RENAMED, make_tiny_model

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def step(**settings: Any) -> ModegptConfig:
    return ModegptConfig.model_validate({"method": "modegpt", "sparsity": 0.3, **settings})


def built(kind: str, **settings: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {} if kind in MULTI_HEAD_ONLY else {"num_key_value_heads": 2}
    named = {RENAMED.get(kind, {}).get(name, name): value for name, value in sizes.items()}
    padding = {"pad_token_id": 0}  # some families' default lies outside a small vocabulary
    config = AutoConfig.for_model(kind, vocab_size=50, **{**padding, **named, **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, json.loads(config.to_json_string())


CASES = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 10}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 6}),
    ("qwen3", {"head_dim": 10, "attention_bias": True}),
    ("granite", {}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("smollm3", {}),
    ("phi3", {}),
    ("phi", {"num_attention_heads": 2}),
    ("phi", {"num_attention_heads": 2, "qk_layernorm": True, "tie_word_embeddings": True}),
    ("opt", {}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"num_attention_heads": 1}),
    ("gpt_neox", {"num_attention_heads": 1, "attention_bias": False}),
    ("gemma2", {"head_dim": 6}),
    ("gemma2", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": False}),
    ("gemma3_text", {"head_dim": 6}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_required_tensors_are_what_transformers_builds(kind: str, settings: dict[str, Any]) -> None:
    model, config = built(kind, **settings)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert resolve(config).required_tensors(config) == expected


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_required_tensors_are_what_transformers_writes(tmp_path: Path, kind: Any) -> None:
    """On disk experts are tensors of their own, and other names than the modules' are in use."""
    folder = make_tiny_model(tmp_path, kind, heads=1, kv_heads=1, hidden=8)
    config = json.loads((folder / "config.json").read_text())
    written = {name: entry.shape for name, entry in read_header(folder / "model.safetensors").items()}
    assert resolve(config).required_tensors(config) == resolve(config).full_names(written)


@pytest.mark.parametrize(
    ("kind", "settings"), [*CASES, ("mixtral", {}), ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 2})]
)
@pytest.mark.parametrize("shape", [(40, 6, 6), (33, 4, 5), (17, 2, 1)])
def test_costs_count_the_parameters_of_any_shape(
    kind: str, settings: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model, config = built(kind, **settings)
    size = resolve(config).dimensions(config)
    rank = size.head_dim if size.qk_norm else shape[1]
    wanted = BlockShape(mlp_width=shape[0], query_key_rank=rank, value_output_rank=shape[2])
    block = model.get_submodule(resolve(config).blocks)[0]
    resize_block_(block, wanted.model_dump())
    counted = sum(parameter.numel() for parameter in block.parameters())
    assert block_costs(resolve(config), config).parameters(wanted) == counted


@given(sparsity=st.floats(0.02, 0.6), layout=st.sampled_from(["portable", "full"]))
@settings(deadline=None)
def test_the_budget_is_met_within_one_rounding_step(sparsity: float, layout: str) -> None:
    family = resolve(LLAMA_7B)
    asked = step(sparsity=sparsity, layout=layout)
    shape = shapes_for(family, LLAMA_7B, asked)[0]
    costs = block_costs(family, LLAMA_7B)
    planned = 1 - costs.parameters(shape) / costs.parameters(dense_shape(family, LLAMA_7B))
    assert abs(planned - sparsity) <= asked.resolved_round_to * costs.per_mlp_unit / costs.parameters(
        dense_shape(family, LLAMA_7B)
    )
    assert shape.mlp_width % asked.resolved_round_to == 0


@given(st.lists(st.floats(0.0, 0.75), min_size=30, max_size=30))
@settings(deadline=None, max_examples=50)
def test_different_sparsities_still_meet_the_total_within_half_a_percent(sparsities: list[float]) -> None:
    """Invariant 8: rounding errors are handed on, so they do not add up."""
    family = resolve(SMOLLM2)
    asked = step(layout="full", allocation="block_influence", sparsity=0.5)
    costs = block_costs(family, SMOLLM2)
    whole = costs.parameters(dense_shape(family, SMOLLM2))
    kept = sum(costs.parameters(shape) for shape in shapes_for(family, SMOLLM2, asked, sparsities))
    assert abs((30 * whole - kept) / (30 * whole) - sum(sparsities) / 30) < 0.005


def test_widths_are_rounded_to_what_kernels_like() -> None:
    """T16: 0.7 of 11008 is 7705.6; a multiple of 128 is 7680."""
    asked = step(sparsity=0.3 * 3 * 4096 * 11008 / (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096), round_to=128)
    assert shapes_for(resolve(LLAMA_7B), LLAMA_7B, asked)[0].mlp_width == 7680


def test_portable_has_one_rank_for_query_key_and_value_output_and_full_may_have_two() -> None:
    modules = ["mlp", "query_key", "value_output"]
    portable = shapes_for(resolve(SMOLLM2), SMOLLM2, step(modules=modules))
    assert len(set(portable)) == 1
    assert portable[0].query_key_rank == portable[0].value_output_rank == 44
    full = shapes_for(resolve(SMOLLM2), SMOLLM2, step(layout="full"))
    assert (full[0].query_key_rank, full[0].value_output_rank) == (44, 45)


def test_a_sparsity_the_chosen_parts_cannot_carry_is_refused() -> None:
    with pytest.raises(InvalidRecipe) as caught:
        shapes_for(resolve(SMOLLM2), SMOLLM2, step(layout="full", modules=["query_key"], sparsity=0.3))
    assert caught.value.code == "sparsity_impossible"


def test_every_family_table_is_found_by_its_name() -> None:
    assert set(known_families()) == {
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
    for name in known_families():
        assert table(name).name == name


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model_type": "bert"}, "unsupported_architecture"),
        ({"model_type": "../../etc"}, "unsupported_architecture"),
        ({"model_type": "spec"}, "unsupported_architecture"),
        ({"model_type": None}, "unsupported_architecture"),
        ({"hidden_size": None}, "invalid_config"),
        ({"hidden_size": -1}, "invalid_config"),
        ({"num_attention_heads": 0}, "invalid_config"),
        ({"num_key_value_heads": 2}, "invalid_config"),
        ({"head_dim": 7}, "invalid_config"),
        ({"intermediate_size": "many"}, "invalid_config"),
        ({"vocab_size": 2**40}, "invalid_config"),
    ],
)
def test_impossible_configurations_are_named(change: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        resolve({**SMOLLM2, **change})
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("opt", {"do_layer_norm_before": False}),  # OPT-350M
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gpt2", {"add_cross_attention": True}),
    ],
)
def test_variants_that_a_table_does_not_hold_for_are_refused_by_name(name: str, change: dict[str, Any]) -> None:
    _, config = built(name, **({"head_dim": 6} if name == "gemma3_text" else {}))
    assert resolve(config).name == name
    with pytest.raises(InvalidCheckpoint) as caught:
        resolve({**config, **change})
    assert (caught.value.code, caught.value.param) == ("unsupported_architecture", next(iter(change)))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"partial_rotary_factor": 0.4}},
        {"rope_parameters": {"partial_rotary_factor": 2.0}},
        {"rope_parameters": "default"},
    ],
)
def test_an_impossible_share_of_rotated_channels_is_named(change: dict[str, Any]) -> None:
    _, config = built("phi", num_attention_heads=2)
    with pytest.raises(InvalidCheckpoint) as caught:
        resolve({**config, **change, "hidden_size": 10})
    assert caught.value.code == "invalid_config"


def test_more_experts_per_token_than_there_are_is_named() -> None:
    _, config = built("mixtral", num_experts_per_tok=9)
    with pytest.raises(InvalidCheckpoint, match="9 of 8 experts"):
        resolve(config)


def test_flags_for_too_few_blocks_are_named() -> None:
    _, config = built("smollm3")
    with pytest.raises(InvalidCheckpoint, match="1 flags"):
        resolve({**config, "no_rope_layers": [1]})


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in SMOLLM2.items() if key != "vocab_size"}
    with pytest.raises(InvalidCheckpoint, match="vocab_size"):
        resolve(config)


def test_width_choices_are_multiples_and_respect_the_cap() -> None:
    asked = step(layout="full", mode="refined", sparsity_cap=0.8)
    dense = dense_shape(resolve(SMOLLM2), SMOLLM2)
    widths = width_choices(dense, asked, "mlp")
    assert widths[0] == 1536
    assert widths[-1] == 312  # the least multiple of 8 that keeps a fifth of 1536
    assert all(a - b == 8 for a, b in itertools.pairwise(widths))
    assert width_choices(dense, asked, "query_key") == (64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16)
    narrow = dense.model_copy(update={"query_key_rank": 10})
    assert width_choices(narrow, asked, "value_output") == (10, 8, 6, 4, 2)


def test_most_removable_is_what_the_narrowest_choices_save() -> None:
    asked = step(layout="full", mode="refined")
    family = resolve(SMOLLM2)
    dense, costs = dense_shape(family, SMOLLM2), block_costs(family, SMOLLM2)
    names = ("mlp", "query_key", "value_output")
    least = {name: width_choices(dense, asked, name)[-1] for name in names}
    narrowest = BlockShape(
        mlp_width=least["mlp"], query_key_rank=least["query_key"], value_output_rank=least["value_output"]
    )
    saved = costs.parameters(dense) - costs.parameters(narrowest)
    assert most_removable(costs, dense, asked, names) == saved
    assert saved / costs.parameters(dense) <= asked.sparsity_cap
