"""Whole blocks taken out: the right ones, the budget, the same model as by hand, refusals by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from api_schemas.methods.modegpt import ModegptConfig
from compression.core.protocols import Cancelled
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.plans import make_plan
from preflight.removal import remaining_config, remaining_step
from tests.compression.test_pipeline import StopAfter, hashes, recipe, run
from tests.compression.walks import random_tokens, step
from tests.tiny_models import make_tiny_model

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 96, "head_dim": 16, "layers": 5}
IDLE = (1, 3)


def with_idle_blocks(folder: Path, idle: tuple[int, ...] = IDLE, **settings: Any) -> Path:
    """A model whose blocks `idle` add next to nothing to the stream: the ones that must go."""
    make_tiny_model(folder, settings.pop("kind", "llama"), **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for index in idle:
            block = model.get_submodule("model.layers")[index]
            block.self_attn.o_proj.weight *= 1e-3
            block.mlp.down_proj.weight *= 1e-3
    model.save_pretrained(folder)
    return folder


def test_depth_alone_is_the_model_without_these_blocks(tmp_path: Path) -> None:
    """Sparsity 2/5 and two blocks gone leave nothing to narrow: the rest is the original's, bit for bit."""
    folder = with_idle_blocks(tmp_path / "in", tied=True)
    report = run(folder, tmp_path / "out", recipe({"mode": "reference", "sparsity": 0.4, "remove_blocks": 2}))
    assert report.removed_blocks == IDLE
    assert json.loads((tmp_path / "out" / "modepress.json").read_text())["removed_blocks"] == list(IDLE)
    by_hand = AutoModelForCausalLM.from_pretrained(folder)
    by_hand.model.layers = torch.nn.ModuleList([by_hand.model.layers[index] for index in (0, 2, 4)])
    for index, block in enumerate(by_hand.model.layers):
        block.self_attn.layer_idx = index
    by_hand.config.num_hidden_layers = 3
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.num_hidden_layers == len(stock.model.layers) == 3
    tokens = random_tokens(1, 40, seed=5)
    with torch.inference_mode():
        torch.testing.assert_close(stock(tokens).logits, by_hand(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["reference", "refined"])
def test_what_is_left_of_the_budget_narrows_the_rest(tmp_path: Path, mode: str) -> None:
    folder = with_idle_blocks(tmp_path / "in")
    asked = recipe({"mode": mode, "sparsity": 0.5, "remove_blocks": 2})
    plan = make_plan(open_checkpoint(folder), asked, model="tiny")
    sink = StopAfter(10**6)
    report = run(folder, tmp_path / "out", asked, sink=sink)
    assert sink.events[-1].percent == 100.0
    assert report.removed_blocks == IDLE
    assert [block.block for block in report.blocks] == [0, 1, 2]
    assert len(report.shapes) == len(plan.blocks) == 3
    assert report.shapes == plan.blocks
    assert report.parameters.after == plan.parameters_after
    assert report.block_parameters.before == plan.block_parameters_before
    assert report.block_parameters.after / report.block_parameters.before == pytest.approx(0.5, abs=0.01)
    assert report.shapes[0].mlp_width < 96
    assert report.steps[0].parameters == report.parameters
    assert (report.steps[0].bytes.before, report.steps[0].bytes.after) == (plan.bytes_before, plan.bytes_after)
    assert report.reload.max_logit_difference <= report.reload.tolerance


def test_reduced_attention_and_an_export_go_with_it(tmp_path: Path) -> None:
    folder = with_idle_blocks(tmp_path / "in", idle=(2,))
    step = {"mode": "reference", "sparsity": 0.4, "remove_blocks": 1, "modules": ["mlp", "query_key", "value_output"]}
    report = run(folder, tmp_path / "out", recipe(step, exports=[{"format": "gguf", "dtype": "f32"}]))
    assert report.removed_blocks == (2,)
    assert report.exports[0].tensors["F32"] == 2 + 4 * 9 + 1 + 1  # outer, four blocks, head, factors
    assert report.shapes[0].query_key_rank < 16


def test_a_cut_run_removes_the_same_blocks(tmp_path: Path) -> None:
    folder = with_idle_blocks(tmp_path / "in")
    asked = recipe({"mode": "reference", "sparsity": 0.5, "remove_blocks": 2})
    run(folder, tmp_path / "whole" / "out", asked)
    with pytest.raises(Cancelled):
        run(folder, tmp_path / "cut" / "out", asked, sink=StopAfter(1))
    run(folder, tmp_path / "cut" / "out", asked)
    assert hashes(tmp_path / "cut" / "out") == hashes(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("kind", "settings", "asked", "code"),
    [
        ("llama", {}, {"sparsity": 0.3, "remove_blocks": 2}, "remove_blocks_exceed_sparsity"),
        ("llama", {}, {"sparsity": 0.5, "remove_blocks": 5}, "remove_blocks_too_many"),
        ("gemma2", {}, {"sparsity": 0.5, "remove_blocks": 1}, "remove_blocks_places"),
        ("smollm3", {}, {"sparsity": 0.5, "remove_blocks": 1}, "remove_blocks_places"),
    ],
)
def test_what_cannot_be_removed_is_refused_in_the_plan(
    tmp_path: Path, kind: Any, settings: Any, asked: dict[str, Any], code: str
) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **{**SIZES, **settings, "layers": 5})
    plan = make_plan(open_checkpoint(folder), recipe({"mode": "reference", **asked}), model="tiny")
    assert [(blocker.code, blocker.param) for blocker in plan.blockers] == [(code, "recipe.steps.0.remove_blocks")]
    assert len(plan.blocks) == 5


def test_other_layouts_have_budgets_per_block_instead() -> None:
    with pytest.raises(ValidationError, match="belongs to layout 'portable'"):
        step(layout="full", remove_blocks=1)
    with pytest.raises(ValidationError, match="remove_blocks counts towards a sparsity"):
        step(sparsity=None, target={"parameters": 1000}, remove_blocks=1)


def test_the_rest_of_the_budget_in_numbers() -> None:
    asked = ModegptConfig(method="modegpt", sparsity=0.3, remove_blocks=2)
    assert remaining_step(asked, 10).sparsity == pytest.approx(1 - 0.7 * 10 / 8)
    assert remaining_step(asked.at(0.2), 10).sparsity == 0.0
    assert remaining_step(asked.model_copy(update={"remove_blocks": 0}), 10).sparsity == 0.3


def test_settings_per_block_follow_the_kept_ones(tmp_path: Path) -> None:
    config = {
        **open_checkpoint(make_tiny_model(tmp_path / "in", "gpt2", layers=3)).config,
        "layer_types": ["a", "b", "c"],
    }
    changed = remaining_config(resolve(config), config, [0, 2])
    assert (changed["n_layer"], changed["layer_types"]) == (2, ["a", "c"])
