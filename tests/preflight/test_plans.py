"""The dry run: blockers by name, honest runtimes, estimates with their basis, hashes that notice every change."""

from pathlib import Path
from typing import Any

import pytest

from api_schemas.recipe import Recipe
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan, recipe_hash
from tests.tiny_models import make_tiny_model


def recipe(step: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    return Recipe.model_validate({"steps": [{"method": "modegpt", "sparsity": 0.3, **(step or {})}], **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path, "llama", hidden=64, intermediate=256, layers=3)


def test_the_default_portable_plan_takes_the_mlp_alone_and_says_so(folder: Path) -> None:
    plan = make_plan(open_checkpoint(folder), recipe(), model="tiny")
    assert plan.modules == ("mlp",)
    assert any("default of layout" in note for note in plan.notes)
    assert plan.blockers == ()
    assert plan.shapes_final
    assert {runtime.runtime: runtime.status for runtime in plan.runtimes}["transformers"] == "verified"


def test_reduced_attention_is_refused_to_runtimes_that_load_it_wrong(folder: Path) -> None:
    modules = ["mlp", "query_key", "value_output"]
    plan = make_plan(open_checkpoint(folder), recipe({"modules": modules}), model="tiny")
    status = {runtime.runtime: runtime.status for runtime in plan.runtimes}
    assert status["llama.cpp (convert_hf_to_gguf.py)"] == "silently_wrong"
    assert status["transformers"] == "verified"


def test_layout_full_is_refused_to_stock_transformers(folder: Path) -> None:
    plan = make_plan(open_checkpoint(folder), recipe({"layout": "full"}), model="tiny")
    assert {runtime.runtime: runtime.status for runtime in plan.runtimes}["transformers"] == "refused"


def test_data_dependent_widths_are_announced(folder: Path) -> None:
    asked = recipe({"layout": "full", "allocation": "block_influence"})
    plan = make_plan(open_checkpoint(folder), asked, model="tiny")
    assert not plan.shapes_final
    assert any("block influence" in note for note in plan.notes)


def test_estimates_name_their_basis(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assumed = make_plan(checkpoint, recipe(), model="tiny")
    measured = make_plan(checkpoint, recipe(), model="tiny", flops_per_second=assumed.flops / 10)
    assert "assumed" in assumed.estimate_basis
    assert "assumed" not in measured.estimate_basis
    assert measured.estimated_seconds == pytest.approx(10)


def test_a_model_without_a_tokenizer_is_blocked(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", tokenizer=False)
    plan = make_plan(open_checkpoint(folder), recipe(), model="tiny")
    assert "tokenizer_missing" in {blocker.code for blocker in plan.blockers}


def test_a_moving_rotary_scale_blocks_portable_attention_only(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    modules = ["mlp", "query_key", "value_output"]
    blocked = make_plan(checkpoint, recipe({"modules": modules}), model="tiny")
    assert [blocker.code for blocker in blocked.blockers] == ["rotary_not_static"]
    assert make_plan(checkpoint, recipe(), model="tiny").blockers == ()


def test_the_hash_notices_every_change() -> None:
    base = recipe()
    others = [
        recipe({"sparsity": 0.31}),
        recipe({"layout": "full"}),
        recipe(seed=1),
        recipe(calibration={"num_samples": 8}),
    ]
    hashes = [recipe_hash(one, "m") for one in (base, *others)] + [recipe_hash(base, "n")]
    assert len(set(hashes)) == len(hashes)
    assert recipe_hash(base, "m") == recipe_hash(recipe(), "m")


def test_a_budget_that_no_choice_of_widths_can_save_is_refused_before_compute(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    asked = {"layout": "full", "modules": ["value_output"], "sparsity": 0.1}
    blockers = make_plan(checkpoint, recipe(asked), model="tiny").blockers
    assert [blocker.code for blocker in blockers] == ["sparsity_impossible"]
    assert make_plan(checkpoint, recipe({**asked, "modules": None}), model="tiny").blockers == ()
