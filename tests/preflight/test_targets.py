"""From a target to a sparsity: never above it, within a rounding step of it, or refused with the least there is."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import Plan
from api_schemas.recipe import Recipe
from api_schemas.targets import Bytes, Target
from compression.core.allocation import allocate
from preflight.checkpoint import Checkpoint, open_checkpoint
from preflight.families import resolve
from preflight.plans import make_plan
from preflight.shapes import block_costs, modules_of, rounding_step, shapes_for
from preflight.written import written
from tests.tiny_models import make_tiny_model

ALL = ("mlp", "query_key", "value_output")
VARIANTS: list[dict[str, Any]] = [
    {"layout": "portable"},
    {"layout": "portable", "modules": ALL, "round_to": 1},
    {"layout": "portable", "mode": "reference", "round_to": 8},
    {"layout": "full"},
    {"layout": "nemotron"},
    {"layout": "full", "allocation": "uniform"},
    {"layout": "full", "allocation": "uniform", "modules": ("query_key", "value_output")},
    {"layout": "full", "mode": "reference", "modules": ("value_output",)},
    {"layout": "full", "mode": "reference", "allocation": "block_influence", "round_to": 4},
]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tied": True}),
    ("qwen2", {}),
    ("qwen3", {"tied": True}),
    ("phi3", {}),
    ("mixtral", {}),
]


def plan_of(checkpoint: Checkpoint, step: dict[str, Any]) -> Plan:
    recipe = Recipe.model_validate({"steps": [{"method": "modegpt", **step}]})
    return make_plan(checkpoint, recipe, model="tiny")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    made = [
        make_tiny_model(tmp_path_factory.mktemp(kind), kind, hidden=64, intermediate=288, layers=3, **more)  # type: ignore[arg-type]
        for kind, more in KINDS
    ]
    return [open_checkpoint(folder) for folder in made]


def step_of(checkpoint: Checkpoint, variant: dict[str, Any]) -> dict[str, Any]:
    """The variant as this family can carry it out."""
    family = resolve(checkpoint.config)
    allowed = {}
    if family.name == "mixtral":
        allowed["mode"] = "reference"
    if variant.get("modules") and family.has_qk_norm(checkpoint.config):
        allowed["modules"] = ("mlp",)
    if variant["layout"] == "nemotron" and family.name != "llama":
        allowed["layout"] = "full"
    if variant["layout"] == "portable" and family.name in ("phi3", "mixtral"):
        allowed |= {"modules": ("mlp",), "round_to": 8}
    return {**variant, **allowed}


@given(
    which=st.integers(0, len(KINDS) - 1),
    variant=st.sampled_from(VARIANTS),
    goal=st.sampled_from(["parameters", "bytes"]),
    share=st.floats(0.05, 0.999),
)
@settings(deadline=None, max_examples=300)
def test_a_plan_ends_at_or_below_its_target_and_within_one_rounding_step(
    checkpoints: list[Checkpoint], which: int, variant: dict[str, Any], goal: str, share: float
) -> None:
    checkpoint = checkpoints[which]
    step = step_of(checkpoint, variant)
    family, config = resolve(checkpoint.config), checkpoint.config
    whole = written(checkpoint, family, step["layout"])
    size = whole.parameters if goal == "parameters" else whole.bytes + whole.overhead
    limit = max(1, int(share * size))
    plan = plan_of(checkpoint, {**step, "target": {goal: limit}})
    after = plan.parameters_after if goal == "parameters" else plan.bytes_after + whole.overhead
    asked = ModegptConfig.model_validate({"method": "modegpt", **step, "target": {goal: limit}})
    codes = [blocker.code for blocker in plan.blockers]
    if codes:
        assert codes == ["target_unreachable"]
        assert str(limit) in plan.blockers[0].message
        return
    costs, modules = block_costs(family, config), modules_of(family, config, asked)
    one = rounding_step(costs, asked, modules)
    if asked.layout == "portable" and "query_key" in modules:  # no MLP is wider than it was, so ranks may decide
        one = max(one, 2 * (costs.per_query_key_rank + costs.per_value_output_rank))
    unit = 1 if goal == "parameters" else whole.bytes_per_parameter
    if asked.resolved_allocation == "uniform":
        assert limit - (one + 1) * len(plan.blocks) * unit < after <= limit
    elif asked.resolved_allocation == "block_influence":
        for tilt in ([1.0, 2.0, 3.0], [3.0, 1.0, 1.0]):
            sparsities = allocate(tilt, plan.sparsity_requested, 1.0, asked.sparsity_cap)
            shapes = shapes_for(family, config, asked.at(plan.sparsity_requested), sparsities)
            saved = plan.block_parameters_before - sum(map(costs.parameters, shapes))
            assert limit - (one + 1) * unit < size - saved * unit <= limit
    else:
        saved = round(plan.sparsity_requested * plan.block_parameters_before)
        assert size - saved * unit <= limit < size - (saved - 1) * unit


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_least_size_that_a_refusal_names_can_be_had_and_less_cannot(
    checkpoints: list[Checkpoint], variant: dict[str, Any]
) -> None:
    refused = plan_of(checkpoints[0], {**variant, "target": {"parameters": 1}})
    assert [blocker.code for blocker in refused.blockers] == ["target_unreachable"]
    assert refused.blockers[0].param == "recipe.steps.0.target.parameters"
    least = int(refused.blockers[0].message.split("at least ")[1].split()[0])
    assert plan_of(checkpoints[0], {**variant, "target": {"parameters": least}}).blockers == ()
    if variant.get("allocation") != "block_influence":
        one_less = plan_of(checkpoints[0], {**variant, "target": {"parameters": least - 1}}).blockers
        assert [blocker.code for blocker in one_less] == ["target_unreachable"]


@pytest.mark.parametrize("goal", ["parameters", "bytes"])
def test_a_target_that_the_model_meets_already_is_named(checkpoints: list[Checkpoint], goal: str) -> None:
    plan = plan_of(checkpoints[0], {"target": {goal: 10**9}})
    assert [(blocker.code, blocker.param) for blocker in plan.blockers] == [
        ("target_already_met", f"recipe.steps.0.target.{goal}")
    ]
    assert plan.parameters_after == plan.parameters_before


def test_bytes_before_a_quantisation_are_refused_and_parameters_are_not(checkpoints: list[Checkpoint]) -> None:
    def plan(target: dict[str, Any]) -> Plan:
        steps = [{"method": "modegpt", "target": target}, {"method": "round_to_nearest"}]
        return make_plan(checkpoints[0], Recipe.model_validate({"steps": steps}), model="tiny")

    codes = [(blocker.code, blocker.param) for blocker in plan({"bytes": "700 kB"}).blockers]
    assert ("target_before_quantization", "recipe.steps.0.target.bytes") in codes
    kept = plan({"parameters": 200_000})
    assert not [blocker for blocker in kept.blockers if blocker.code.startswith("target")]
    assert kept.parameters_after <= 200_000


def test_the_plan_says_which_sparsity_the_target_came_to(checkpoints: list[Checkpoint]) -> None:
    plan = plan_of(checkpoints[0], {"target": {"bytes": "0.7 MB"}})
    assert any("follows from target.bytes 700000" in note for note in plan.notes)
    same = plan_of(checkpoints[0], {"sparsity": plan.sparsity_requested})
    assert (same.blocks, same.bytes_after) == (plan.blocks, plan.bytes_after)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("8 GB", 8_000_000_000),
        ("90 MiB", 94_371_840),
        ("1.5GiB", 1_610_612_736),
        ("0.1 TB", 10**11),
        ("512 B", 512),
        (7, 7),
    ],
)
def test_sizes_are_read_exactly(said: Any, meant: int) -> None:
    assert Target.model_validate({"bytes": said}).limit == meant
    assert Target.model_validate_json(Target(bytes=meant).model_dump_json()).limit == meant


@pytest.mark.parametrize(
    "said", ["8 gb", "8G", "8", "GB", "-8 GB", "8  GB", "8e3 MB", "0.5 B", "1.0000001 MB", "0 GB", 0, -1, True, 1.5]
)
def test_sizes_that_are_not_exact_are_refused(said: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Bytes).validate_python(said)


@pytest.mark.parametrize(
    "step",
    [
        {},
        {"sparsity": 0.2, "target": {"parameters": 5}},
        {"target": {}},
        {"target": {"parameters": 5, "bytes": 7}},
        {"target": {"parameters": "5"}},
    ],
)
def test_exactly_one_goal(step: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"exactly one|valid integer"):
        ModegptConfig.model_validate({"method": "modegpt", **step})


def test_a_stored_copy_of_a_tied_head_and_old_buffers_are_not_counted(tmp_path: Path) -> None:
    """They are not written, so a plan that counted them would remove too much."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model(tmp_path, "llama", tied=True)
    plain = written(open_checkpoint(folder), resolve(open_checkpoint(folder).config), "portable")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    again = written(open_checkpoint(folder), resolve(open_checkpoint(folder).config), "portable")
    assert again == plain
