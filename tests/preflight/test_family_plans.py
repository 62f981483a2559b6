"""What a family cannot do is said in the plan, by name."""

from pathlib import Path
from typing import Any

import pytest

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.recipe import Recipe
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.plans import make_plan, recipe_blockers
from preflight.shapes import modules_of, shapes_for
from tests.tiny_models import make_tiny_model

ALL = ("mlp", "query_key", "value_output")


def codes(folder: Path, **settings: Any) -> list[str]:
    config = open_checkpoint(folder).config
    step = ModegptConfig.model_validate({"method": "modegpt", "mode": "reference", "sparsity": 0.2, **settings})
    return [blocker.code for blocker in recipe_blockers(resolve(config), config, step)]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_query_key_is_left_alone_where_it_is_normalised_per_head(tmp_path: Path, kind: Any) -> None:
    folder = make_tiny_model(tmp_path, kind)
    assert codes(folder, layout="full") == []
    assert codes(folder, layout="full", modules=ALL) == ["qk_norm"]
    recipe = Recipe.model_validate({"steps": [{"method": "modegpt", "sparsity": 0.2, "layout": "full"}]})
    plan = make_plan(open_checkpoint(folder), recipe, model="tiny")
    assert plan.modules == ("mlp", "value_output")
    assert any("query_key is left alone" in note for note in plan.notes)


def test_the_parts_that_are_left_carry_the_whole_sparsity(tmp_path: Path) -> None:
    config = open_checkpoint(make_tiny_model(tmp_path, "qwen3", intermediate=200)).config
    family = resolve(config)
    step = ModegptConfig.model_validate(
        {"method": "modegpt", "mode": "reference", "sparsity": 0.2, "layout": "full", "round_to": 1}
    )
    assert modules_of(family, config, step) == ("mlp", "value_output")
    shape = shapes_for(family, config, step)[0]
    assert shape.query_key_rank == 8
    assert shape.value_output_rank < 8
    assert shape.mlp_width < 160


@pytest.mark.parametrize("kind", ["qwen3", "phi", "phi3", "opt", "gpt2", "gpt_neox", "gemma3_text"])
def test_portable_attention_is_refused_where_stock_code_cannot_load_it(tmp_path: Path, kind: Any) -> None:
    folder = make_tiny_model(tmp_path, kind, heads=2, hidden=16)
    assert codes(folder, layout="portable", modules=["mlp"]) == []
    assert "head_dim_not_free" in codes(folder, layout="portable", modules=ALL)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_portable_experts_have_widths_that_stock_kernels_take(tmp_path: Path, kind: Any) -> None:
    folder = make_tiny_model(tmp_path, kind)
    assert codes(folder, layout="portable") == []
    assert codes(folder, layout="portable", round_to=4) == ["expert_width"]
    assert codes(folder, layout="full", round_to=4) == []


def test_experts_cost_memory_for_all_and_operations_for_those_that_are_used(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"steps": [{"method": "modegpt", "mode": "reference", "sparsity": 0.2, "round_to": 8}]}
    )
    few, many = (
        make_plan(
            open_checkpoint(
                make_tiny_model(tmp_path / str(count), "mixtral", intermediate=2048, num_local_experts=count)
            ),
            recipe,
            model="tiny",
        )
        for count in (2, 8)
    )
    assert many.flops < 1.6 * few.flops  # solves are per expert, passes are not
    assert many.peak_memory_bytes - few.peak_memory_bytes > 6 * 2048**2 * 8


@pytest.mark.parametrize("kind", ["granite", "smollm3", "gemma2", "mixtral"])
def test_portable_attention_is_allowed_where_stock_code_loads_it(tmp_path: Path, kind: Any) -> None:
    assert codes(make_tiny_model(tmp_path, kind), layout="portable", modules=ALL) == []
