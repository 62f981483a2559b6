"""Artifacts of vision-language models are served with their images: what came with the original is what is used."""

import pytest

from api_schemas.recipe import Recipe
from compression.core.protocols import NullSink
from compression.pipeline import compress
from preflight.checkpoint import describe, open_checkpoint
from tests.tiny_vision_models import make_tiny_vision_model, picture
from tests.workers.inference.test_vision_models import answer, generated, task_of, text_of
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

NARROWER = {"method": "modegpt", "sparsity": 0.3, "round_to": 8}
CASES = [
    ("smolvlm", [NARROWER]),
    ("llava", [NARROWER | {"layout": "full"}]),
    ("llava", [NARROWER | {"round_to": 32, "modules": ["mlp"]}, {"method": "gptq", "bits": 8, "group_size": 32}]),
]


@pytest.mark.parametrize(("kind", "steps"), CASES)
def test_an_artifact_answers_to_images_as_transformers_does(tmp_path, kind, steps):
    source, target = make_tiny_vision_model(tmp_path / "dense", kind), tmp_path / "small"
    text = {"num_samples": 4, "sequence_length": 64}
    judged = {"num_windows": 2, "sequence_length": 64, "generation_tokens": 2}
    recipe = Recipe.model_validate({"steps": steps, "calibration": text, "evaluation": judged})
    quiet = {"progress": NullSink(), "files": {}, "roots": None, "hub_offline": True}
    compress(recipe, source, target, model="m", blocks=tmp_path / "blocks", **quiet)

    facts = describe(open_checkpoint(target))
    assert (facts.reads_images, facts.has_chat_template) == (True, True)
    dense, small = (load(plan_load(ModelSource("m", folder, 1.0))) for folder in (source, target))
    images = picture(1), picture(2)
    task = task_of(small, *images)
    assert task.prompt == task_of(dense, *images).prompt
    said = text_of(answer(small, task))
    assert said == generated(small, task.prompt, task.pictures, task.max_tokens)[0]
    assert said != text_of(answer(small, task_of(small, *reversed(images))))
