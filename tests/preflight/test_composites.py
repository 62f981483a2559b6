"""A decoder among other parts: found under any spelling, counted part by part, refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from api_schemas.errors import InvalidCheckpoint
from api_schemas.recipe import Recipe
from preflight.checkpoint import describe, open_checkpoint
from preflight.composite_rows import ASSUMED, COMPOSITES
from preflight.composites import composite_of
from preflight.families import table
from preflight.plans import make_plan
from tests.tiny_composites import KINDS, make_tiny_composite, respell
from tests.tiny_models import make_tiny_model

LLAVA_TO_NEW = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def recipe(**step: Any) -> Recipe:
    return Recipe.model_validate({"steps": [{"method": "modegpt", "sparsity": 0.3, "round_to": 8, **step}]})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_counted_and_add_up(tmp_path: Path, kind: str) -> None:
    decoder = COMPOSITES[kind].decoder
    facts = describe(open_checkpoint(make_tiny_composite(tmp_path, kind, decoder)))
    assert (facts.modality, facts.family, facts.model_type) == ("image-text", decoder, kind)
    assert [part.name for part in facts.parts] == ["language", "projector", "vision"]
    assert sum(part.parameters for part in facts.parts) == facts.parameters
    assert sum(part.bytes for part in facts.parts) == facts.bytes
    if table(decoder).alone:
        alone = describe(open_checkpoint(make_tiny_model(tmp_path / "text", decoder)))  # type: ignore[arg-type]
        assert facts.parts[0].parameters == alone.parameters + 2 * 32 * (facts.vocabulary - alone.vocabulary)
        assert facts.block_parameters == alone.block_parameters
    assert facts.blockers == ()


def test_both_spellings_are_one_decoder(tmp_path: Path) -> None:
    old = open_checkpoint(make_tiny_composite(tmp_path / "old"))
    new = open_checkpoint(respell(make_tiny_composite(tmp_path / "new"), *LLAVA_TO_NEW))
    assert old.tensors.keys() != new.tensors.keys()
    assert old.decoder.tensors.keys() == new.decoder.tensors.keys()
    assert old.decoder.config == new.decoder.config
    for one in (old, new):
        assert one.placed is not None
        assert {one.placed.disk_name(name) for name in one.decoder.tensors} | one.placed.others.keys() == set(
            one.tensors
        )


@pytest.mark.parametrize("decoder", ASSUMED)
def test_what_text_config_leaves_out_is_what_the_stock_class_assumes(decoder: str) -> None:
    stock = getattr(transformers, table(decoder).architecture).config_class()
    assert {key: getattr(stock, key) for key in ASSUMED[decoder]} == ASSUMED[decoder]
    left = {"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"}
    size, said = table(decoder).dimensions(ASSUMED[decoder]), stock.to_dict()
    assert size == table(decoder).dimensions({**ASSUMED[decoder], **{key: said.get(key) for key in left}})


def test_every_row_names_classes_of_transformers() -> None:
    for row in COMPOSITES.values():
        if row.ours:
            assert not hasattr(transformers, row.architecture)
            continue
        config = getattr(transformers, row.architecture).config_class()
        assert config.model_type == row.model_type
        assert config.tie_word_embeddings == row.tied
        assert config.text_config.model_type == row.decoder


@pytest.mark.parametrize("tied_in", ["whole", "text"])
def test_a_head_is_tied_where_the_stock_class_ties_it(tmp_path: Path, tied_in: str) -> None:
    folder = make_tiny_composite(tmp_path, tied=True)
    edit_config(folder, lambda config: config.update(tie_word_embeddings=tied_in == "whole"))
    edit_config(folder, lambda config: config["text_config"].update(tie_word_embeddings=tied_in == "text"))
    assert describe(open_checkpoint(folder)).tied_head
    assert transformers.AutoConfig.from_pretrained(folder).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        (lambda c: c.update(text_config=None), "invalid_config", "text_config"),
        (lambda c: c["text_config"].update(hidden_size="wide"), "invalid_config", None),
        (
            lambda c: c["text_config"].update(num_hidden_layers=3),
            "missing_tensor",
            "model.layers.2.input_layernorm.weight",
        ),
        (lambda c: c["text_config"].update(intermediate_size=40), "wrong_shape", None),
    ],
)
def test_a_broken_configuration_is_refused_by_name(tmp_path: Path, change: Any, code: str, param: str | None) -> None:
    folder = edit_config(make_tiny_composite(tmp_path), change)
    with pytest.raises(InvalidCheckpoint) as refused:
        open_checkpoint(folder)
    assert refused.value.code == code
    assert param is None or refused.value.param == param


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_missing_part_is_refused_by_name(tmp_path: Path, part: str) -> None:
    folder = make_tiny_composite(tmp_path)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(part)])
    with pytest.raises(InvalidCheckpoint, match=part) as refused:
        open_checkpoint(folder)
    assert refused.value.code == "missing_tensor"


def test_what_cannot_be_compressed_is_a_blocker(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path)
    edit_config(folder, lambda config: config.update(architectures=["LlavaModel"]))
    edit_tensors(folder, lambda t: t.update({"vision_tower.x": t["vision_tower.embeddings.class_embedding"].char()}))
    facts = describe(open_checkpoint(folder))
    assert [blocker.code for blocker in facts.blockers] == ["unsupported_architecture", "unsupported_dtype"]
    edit_config(folder, lambda config: config["text_config"].update(model_type="cohere"))
    assert "unsupported_architecture" in {one.code for one in describe(open_checkpoint(folder)).blockers}


def test_a_family_that_was_never_seen_in_a_composite_is_a_blocker(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path, decoder="gemma2")
    named = [one for one in describe(open_checkpoint(folder)).blockers if one.param == "text_config.model_type"]
    assert [one.code for one in named] == ["unsupported_architecture"]


def test_a_composite_without_a_row_is_refused_by_name(tmp_path: Path) -> None:
    folder = edit_config(make_tiny_composite(tmp_path), lambda config: config.update(model_type="mllama"))
    checkpoint = open_checkpoint(folder)
    assert composite_of(checkpoint.config) is None
    blocker = describe(checkpoint).blockers[0]
    assert (blocker.code, blocker.param) == ("unsupported_architecture", "model_type")
    with pytest.raises(InvalidCheckpoint, match="mllama"):
        make_plan(checkpoint, recipe(), model="m")


def test_a_plan_counts_all_parts_and_changes_the_language_part_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_composite(tmp_path))
    plan, facts = make_plan(checkpoint, recipe(), model="m"), describe(checkpoint)
    assert plan.blockers == ()
    assert plan == make_plan(checkpoint.decoder, recipe(), model="m")
    assert describe(checkpoint.decoder) == facts
    assert plan.parts == facts.parts
    assert plan.bytes_before == facts.bytes == sum(part.bytes for part in facts.parts)
    assert plan.parameters_before == facts.parameters
    assert plan.parameters_before - plan.parameters_after == plan.block_parameters_before - plan.block_parameters_after
    assert any(warning.startswith("text_only_calibration:") for warning in plan.warnings)
    assert {row.runtime: row.status for row in plan.runtimes} == {
        "modepress": "verified",
        "transformers": "verified",
        "vllm": "believed",
    }


@pytest.mark.parametrize("layout", ["portable", "full"])
def test_a_target_is_that_of_the_whole_model(tmp_path: Path, layout: str) -> None:
    checkpoint = open_checkpoint(make_tiny_composite(tmp_path))
    whole = describe(checkpoint)
    limit = whole.parameters - whole.block_parameters // 5
    step = {"layout": layout, "mode": "reference", "sparsity": None, "target": {"parameters": limit}}
    plan = make_plan(checkpoint, recipe(**step), model="m")
    assert plan.blockers == ()
    assert limit - 3000 < plan.parameters_after <= limit


def test_what_a_composite_rules_out_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_composite(tmp_path))
    asked = recipe(layout="nemotron").model_dump() | {"exports": [{"format": "gguf", "dtype": "f32"}]}
    codes = {one.code: one.param for one in make_plan(checkpoint, Recipe.model_validate(asked), model="m").blockers}
    assert codes["nemotron_family"] == "recipe.steps.0.layout"
    assert codes["export_of_part"] == "recipe.exports.0"


IMAGES = {"calibration": {"source": "file", "path": "rows.jsonl", "image_field": "image"}}


def codes(folder: Path, asked: Recipe) -> dict[str, str | None]:
    plan = make_plan(open_checkpoint(folder), asked, model="m")
    return {blocker.code: blocker.param for blocker in plan.blockers}


def test_images_are_shown_to_models_that_see(tmp_path: Path) -> None:
    asked = Recipe.model_validate(recipe().model_dump() | IMAGES)
    where = "recipe.calibration.image_field"
    assert codes(make_tiny_model(tmp_path / "text"), asked) == {"images_need_vision_model": where}
    folder = make_tiny_composite(tmp_path / "m")
    assert codes(folder, asked) == {}
    plan = make_plan(open_checkpoint(folder), asked, model="m")
    named = {one.partition(":")[0] for one in plan.warnings}
    assert "judged_on_text" in named
    assert "text_only_calibration" not in named
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    assert codes(folder, asked) == {"processor_missing": where}


def test_a_search_has_no_images(tmp_path: Path) -> None:
    step = {"method": "modegpt", "target": {"perplexity_increase": 0.1}}
    asked = Recipe.model_validate({"steps": [step], **IMAGES})
    where = "recipe.steps.0.target.perplexity_increase"
    assert codes(make_tiny_composite(tmp_path), asked) == {"images_cannot_search": where}


def test_a_projector_as_wide_as_the_mlp_rules_out_portable(tmp_path: Path) -> None:
    folder = make_tiny_composite(tmp_path, "idefics2", "mistral")
    assert codes(folder, recipe()) == {"projector_shares_width": "recipe.steps.0.layout"}
    assert codes(folder, recipe(layout="full")) == {}
    assert codes(folder, recipe(modules=["query_key", "value_output"])) == {}


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_images_are_not_shown_where_the_walk_would_see_them_wrongly(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_composite(tmp_path, kind, COMPOSITES[kind].decoder)
    asked = Recipe.model_validate(recipe().model_dump() | IMAGES)
    assert codes(folder, asked) == {"images_not_walked": "recipe.calibration.image_field"}


def test_a_decoder_that_is_only_found_inside_is_refused_alone(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen2")
    edit_config(folder, lambda config: config.update(model_type="qwen2_vl_text", architectures=["Qwen2VLTextModel"]))
    named = [(one.code, one.param) for one in describe(open_checkpoint(folder)).blockers]
    assert named == [("unsupported_architecture", "model_type")]


PLACES = st.sampled_from(["", "text_config"])
KEYS = st.sampled_from(
    "model_type architectures text_config vision_config hidden_size num_attention_heads num_key_value_heads head_dim "
    "intermediate_size num_hidden_layers vocab_size tie_word_embeddings quantization_config block_shapes".split()
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5)
VALUES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(max_size=5), LEAVES, max_size=2)
CHANGES = st.lists(st.tuples(PLACES, KEYS, VALUES), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_composite(tmp_path_factory.mktemp("llava"))


@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_whatever_the_configuration_only_one_kind_of_error(llava: Path, changes: list[tuple[str, str, Any]]) -> None:
    original = (llava / "config.json").read_text()
    config = json.loads(original)
    for place, key, value in changes:
        target = config.get(place, config) if place else config
        if isinstance(target, dict):
            target[key] = value
    (llava / "config.json").write_text(json.dumps(config))
    try:
        facts = describe(open_checkpoint(llava))
    except InvalidCheckpoint:
        return
    finally:
        (llava / "config.json").write_text(original)
    assert facts.parameters == 55696
