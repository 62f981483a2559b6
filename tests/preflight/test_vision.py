"""Which checkpoints are said to read images, in words and in facts."""

import json
from pathlib import Path

import pytest
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from api_schemas.models import CheckpointFacts
from preflight.checkpoint import describe, open_checkpoint
from preflight.composite_rows import COMPOSITES
from preflight.vision import NEEDS_TORCHVISION, NOT_SERVED, TESTED, UNTESTED
from tests.tiny_vision_families import FAMILIES
from tests.tiny_vision_models import make_tiny_vision_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {name: make_tiny_vision_model(root / name, name) for name in ("llava", "qwen2_vl")}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return make_tiny_vision_model(tmp_path / "llava")


def facts_of(folder: Path, **config: object) -> CheckpointFacts:
    path = folder / "config.json"
    if config:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return describe(open_checkpoint(folder))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_facts_of_a_model_that_reads_images(folders: dict[str, Path], name: str) -> None:
    facts = facts_of(folders[name])
    assert (facts.model_type, facts.modality, facts.reads_images) == (name, "image-text", True)
    assert (facts.blocks, facts.context_length, facts.dtype) == (2, 1024, "F32")
    assert facts.vocabulary > 384
    assert 0 < facts.block_parameters < facts.parameters
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32 + (64 if name == "qwen2_vl" else 0)
    assert facts.block_parameters == 2 * block  # the decoder's, not the vision tower's
    assert any(warning.startswith("it can be served: chat takes text and images") for warning in facts.warnings)


def test_a_model_that_only_transformers_vouches_for_says_so(llava: Path) -> None:
    facts = facts_of(llava, model_type="aya_vision")
    assert facts.reads_images
    assert any("untested here" in warning for warning in facts.warnings)


@pytest.mark.parametrize(("name", "said"), [("mllama", "cross-attention"), ("phi3_v", "not among the types")])
def test_models_whose_images_are_refused(llava: Path, name: str, said: str) -> None:
    facts = facts_of(llava, model_type=name)
    assert not facts.reads_images
    assert any("images are refused in chat" in warning and said in warning for warning in facts.warnings)


def test_a_processor_for_torchvision_alone_is_no_promise(llava: Path) -> None:
    facts = facts_of(llava, model_type="lfm2_vl")
    assert not facts.reads_images
    assert any("only where torchvision is installed" in warning for warning in facts.warnings)


def test_without_a_processor_images_are_refused(llava: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (llava / name).unlink()
    facts = facts_of(llava)
    assert not facts.reads_images
    assert any("no processor_config.json" in warning for warning in facts.warnings)


def test_the_tables_name_what_transformers_has() -> None:
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    served = (*TESTED, *UNTESTED, *NEEDS_TORCHVISION)
    assert {*TESTED, "mistral3"} == set(FAMILIES)
    assert len(served) == len(set(served))
    assert not set(served) & NOT_SERVED.keys()
    ours = {row.model_type for row in COMPOSITES.values() if row.ours}
    assert {*served, *NOT_SERVED} - ours <= set(names)
    decoders = {config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    assert set(TESTED) - ours <= decoders
