"""Vision-language models that cannot take an image, and images that a model cannot take: each has a name."""

import json
import shutil

import pytest
from transformers.utils import is_torchvision_available

from api_schemas.errors import InvalidCheckpoint, InvalidRequest
from api_schemas.inference import ChatRequest
from tests.tiny_vision_models import encoded, make_tiny_vision_model, picture
from tests.workers.inference.test_vision_models import answer, conversation, generated, task_of, text_of
from workers.inference.images.reading import ImageFile
from workers.inference.loading import load, plan_load
from workers.inference.prompts import chat_task
from workers.inference.registry import ModelSource


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of a tiny LLaVA."""
    return make_tiny_vision_model(tmp_path_factory.mktemp("vision") / "llava")


def changed(folder, tmp_path, name, change):
    """A copy of a folder, in memory, with one of its JSON files changed."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return load(plan_load(ModelSource("changed", copy, 1.0)))


def test_a_template_that_shows_no_images(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "changed")
    (copy / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    loaded = load(plan_load(ModelSource("changed", copy, 1.0)))
    text = loaded.tokenizer.decode(task_of(loaded, turns=conversation(0)).prompt)
    assert text == "What is this?A hill.Sure?"
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded, picture(1))
    assert caught.value.code == "chat_template_without_images"


def test_no_processor_means_text_alone(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "changed")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copy / name).unlink()
    template = (copy / "chat_template.jinja").read_text()
    only_parts = template.replace("message['content'] is string", "false")  # as LLaVA's own: a string has no parts
    assert only_parts != template
    (copy / "chat_template.jinja").write_text(only_parts)
    loaded = load(plan_load(ModelSource("changed", copy, 1.0)))
    assert "What is this?" in loaded.tokenizer.decode(task_of(loaded, turns=conversation(0)).prompt)
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded, picture(1))
    assert (caught.value.code, caught.value.param) == ("processor_missing", "messages.0.content.0")


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("processor_config.json", {"processor_class": "NoSuchProcessor"}, "processor_load_failed"),
        ("processor_config.json", {"processor_class": "LlamaForCausalLM"}, "processor_load_failed"),
    ],
)
def test_processors_that_cannot_be_loaded(llava, tmp_path, name, change, code):
    with pytest.raises(InvalidCheckpoint) as caught:
        changed(llava, tmp_path, name, change)
    assert caught.value.code == code


@pytest.mark.skipif(is_torchvision_available(), reason="says what is missing without torchvision")
def test_a_processor_for_torchvision_alone_leaves_text(tmp_path):
    loaded = load(plan_load(ModelSource("m", make_tiny_vision_model(tmp_path / "m", "mistral3"), 1.0)))
    task = task_of(loaded, turns=conversation(0))
    assert text_of(answer(loaded, task)) == generated(loaded, task.prompt, {}, task.max_tokens)[0]
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded, picture(1))
    assert (caught.value.code, caught.value.param) == ("processor_needs_torchvision", "messages.0.content.0")
    assert "pip install torchvision" in caught.value.message


def test_an_image_that_the_models_processor_refuses(llava, tmp_path):
    loaded = changed(llava, tmp_path, "preprocessor_config.json", {"size": {"shortest_edge": 0}})
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded, picture(1))
    assert (caught.value.code, caught.value.param) == ("image_not_processable", "messages.0.content.0")


def test_a_damaged_image_is_named_by_its_place(llava):
    sound, damaged = encoded(picture(1)), encoded(picture(2))[:-40]
    images = (ImageFile("messages.0.content.0", sound, 10**6), ImageFile("messages.0.content.1", damaged, 10**6))
    body = {"model": "m", "messages": conversation(2)}
    with pytest.raises(InvalidRequest) as caught:
        chat_task(load(plan_load(ModelSource("m", llava, 1.0))), ChatRequest.model_validate(body), images)
    assert (caught.value.code, caught.value.param) == ("image_damaged", "messages.0.content.1")
