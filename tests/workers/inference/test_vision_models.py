"""Vision-language models in the token loop, against transformers' own processor and generate()."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor

from api_schemas.errors import InvalidRequest
from api_schemas.inference import ChatRequest
from preflight.vision import TESTED
from tests.tiny_vision_models import encoded, make_tiny_vision_model, picture
from workers.inference import generation
from workers.inference.generation import _Decoder, generate
from workers.inference.images.reading import ImageFile
from workers.inference.loading import load, plan_load
from workers.inference.precision import Precision
from workers.inference.prompts import chat_task
from workers.inference.registry import ModelSource
from workers.inference.sampling import of_choice
from workers.inference.vision_prompts import standing_tokens

NEEDS_NO_VIDEO = (
    "gemma3",
    "idefics3",
    "llava",
    "llava_next",
)  # transformers builds the whole processor without torchvision
# PaliGemma's own processor hands torch's tensors to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16, "cpu", "as stored")
URL = {"url": "data:image/png;base64,"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny vision models by type."""
    root = tmp_path_factory.mktemp("vision")
    return {name: make_tiny_vision_model(root / name, name) for name in TESTED}


@pytest.fixture(scope="module")
def vision(folders):
    """The same models in memory."""
    return {name: load(plan_load(ModelSource(name, folder, 1.0))) for name, folder in folders.items()}


def files(*images, max_pixels=10**6):
    return tuple(ImageFile(f"messages.0.content.{at}", encoded(one), max_pixels) for at, one in enumerate(images))


def conversation(images, text="What is this?"):
    """Turns for our API: all images, then a text, then an answer and a further question."""
    parts = [{"type": "image_url", "image_url": URL}] * images + [{"type": "text", "text": text}]
    turns = [{"role": "user", "content": parts}]
    return [*turns, {"role": "assistant", "content": "A hill."}, {"role": "user", "content": "Sure?"}]


def task_of(loaded, *images, max_tokens=12, turns=None, **values):
    body = {"model": "m", "messages": turns or conversation(len(images)), "max_tokens": max_tokens, "temperature": 0}
    return chat_task(loaded, ChatRequest.model_validate(body | values), files(*images))


def answer(loaded, task):
    return list(generate(loaded, task, lambda: False))


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def generated(loaded, prompt, pictures, tokens):
    """What transformers generates greedily."""
    ids = torch.tensor([prompt])
    output = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **pictures, max_new_tokens=tokens, do_sample=False
    )
    new = output[0, len(prompt) :].tolist()
    return loaded.tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd"), len(new)


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("images", [1, 2])
def test_greedy_is_what_transformers_generates(vision, name, images):
    loaded = vision[name]
    task = task_of(loaded, *(picture(seed, 48, 40 + 8 * seed) for seed in range(images)))
    pieces = answer(loaded, task)
    assert (text_of(pieces), pieces[-1].tokens) == generated(loaded, task.prompt, task.pictures, task.max_tokens)


@pytest.mark.parametrize("name", TESTED)
def test_several_answers_about_a_picture_are_each_as_if_alone(vision, name):
    loaded = vision[name]
    task = task_of(loaded, picture(3), max_tokens=6, temperature=1.0, top_p=1.0, seed=1, n=3)
    pieces = answer(loaded, task)
    for index in range(3):
        alone = replace(task, choices=1, sampling=of_choice(task.sampling, index))
        assert text_of(answer(loaded, alone)) == text_of(piece for piece in pieces if piece.index == index)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "smolvlm"])
def test_pixels_are_in_the_models_number_format(tmp_path, name):
    folder = make_tiny_vision_model(tmp_path / name, name, dtype=torch.bfloat16)
    loaded = load(replace(plan_load(ModelSource("m", folder, 1.0)), precision=BFLOAT16))
    task = task_of(loaded, picture(1), picture(2))
    assert task.pictures["pixel_values"].dtype is torch.bfloat16
    assert all(
        value.dtype is not torch.bfloat16 for key, value in task.pictures.items() if "grid" in key or "size" in key
    )
    assert text_of(answer(loaded, task)) == generated(loaded, task.prompt, task.pictures, task.max_tokens)[0]


@pytest.mark.parametrize("name", NEEDS_NO_VIDEO)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompt_and_pixels_are_those_of_transformers_own_template_and_processor(vision, folders, name, count):
    images = [picture(0), picture(1, 64, 40)][:count]
    turns = [
        {
            "role": "user",
            "content": [*({"type": "image", "image": one} for one in images), {"type": "text", "text": "?"}],
        },
    ]
    stock = AutoProcessor.from_pretrained(folders[name], local_files_only=True, backend="pil").apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    task = task_of(vision[name], *images, turns=conversation(count, "?")[:1])
    assert task.prompt == stock["input_ids"][0].tolist()
    if images:
        assert task.pictures.keys() == stock.keys() - {"input_ids", "attention_mask"}
    for key, value in task.pictures.items():
        torch.testing.assert_close(value, stock[key], rtol=0, atol=0)


@pytest.mark.parametrize("begin", ["<|im_start|>", ""])
def test_a_begin_token_is_added_unless_the_template_has_it(folders, tmp_path, begin):
    copy = shutil.copytree(folders["llava"], tmp_path / "begins")
    path = copy / "tokenizer.json"
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    template = copy / "chat_template.jinja"
    template.write_text(begin + template.read_text().replace("<|im_start|>", "## "))
    stock = AutoProcessor.from_pretrained(copy, local_files_only=True, backend="pil")
    loaded = load(plan_load(ModelSource("m", copy, 1.0)))
    for image in ([], [picture(1)]):
        parts = [*({"type": "image", "image": one} for one in image), {"type": "text", "text": "?"}]
        expected = stock.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        prompt = task_of(loaded, *image, turns=conversation(len(image), "?")[:1]).prompt
        assert prompt == expected["input_ids"][0]
        assert prompt.count(1) == 1


@pytest.mark.parametrize("name", TESTED)
def test_the_answer_depends_on_the_image_and_on_the_order_of_images(vision, name):
    loaded = vision[name]

    def logits(*images):
        task = task_of(loaded, *images)
        with torch.inference_mode():
            return _Decoder(loaded).read(task.prompt, task.pictures)

    one, other = picture(1), picture(2)
    assert (logits(one) - logits(other)).abs().max() > 1e-3
    assert (logits(one, other) - logits(other, one)).abs().max() > 1e-3
    torch.testing.assert_close(logits(one), logits(one), rtol=0, atol=0)


@pytest.mark.parametrize("name", TESTED)
def test_text_alone_works_and_does_not_remember_an_earlier_image(vision, name):
    loaded = vision[name]
    task = task_of(loaded, turns=conversation(0))
    assert task.pictures == {}
    before = text_of(answer(loaded, task))
    assert before == generated(loaded, task.prompt, {}, task.max_tokens)[0]
    answer(loaded, task_of(loaded, picture(1, 80, 40), picture(2)))
    assert text_of(answer(loaded, task)) == before


@pytest.mark.parametrize("name", TESTED)
def test_the_tokens_of_images_count(vision, name):
    loaded = vision[name]
    without = task_of(loaded, turns=conversation(0))
    one, two = task_of(loaded, picture(1)), task_of(loaded, picture(1), picture(1))
    marks = [task.prompt.count(loaded.processor.image_token_id) for task in (without, one, two)]
    assert marks[0] == 0 < marks[1]
    assert len(without.prompt) + 1 < len(one.prompt)
    many = [picture(1)] * (2 * 1024 // (len(two.prompt) - len(without.prompt)) + 40)
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded, *many)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("name", TESTED)
def test_text_that_spells_a_token_which_stands_for_an_image_is_refused(vision, name):
    loaded = vision[name]
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.model.config.image_token_id) in standing_tokens(loaded)
    for mark in standing_tokens(loaded):
        for images in (0, 1):
            with pytest.raises(InvalidRequest) as caught:
                task_of(loaded, *[picture(1)] * images, turns=conversation(images, f"what is {mark}?"))
            assert (caught.value.code, caught.value.param) == ("image_token_in_text", "messages.0.content")


@pytest.mark.parametrize("name", TESTED)
def test_nor_may_two_parts_spell_it_together(vision, name):
    loaded = vision[name]
    for mark in standing_tokens(loaded):
        parts = [{"type": "text", "text": mark[:3]}, {"type": "text", "text": mark[3:]}]
        turns = [{"role": "user", "content": [{"type": "image_url", "image_url": URL}, *parts]}]
        with pytest.raises(InvalidRequest) as caught:
            task_of(loaded, picture(1), turns=turns)
        assert caught.value.code in ("image_token_in_text", "chat_template_without_images")


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "llava_onevision"])
def test_folders_of_older_releases(vision, folders, tmp_path, name):
    """No processor_config.json where the class's own values do, and the template in a JSON file of its own."""
    copy = shutil.copytree(folders[name], tmp_path / "older")
    if name == "qwen2_vl":
        (copy / "processor_config.json").unlink()
    template = copy / "chat_template.jinja"
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    loaded = load(plan_load(ModelSource("older", copy, 1.0)))
    assert loaded.tokenizer.chat_template is None
    assert task_of(loaded, picture(1)).prompt == task_of(vision[name], picture(1)).prompt


def test_no_cut_goes_through_an_image(vision, monkeypatch):
    for loaded in vision.values():
        task = task_of(loaded, picture(1), picture(2))
        whole = text_of(answer(loaded, task))
        with monkeypatch.context() as patch:
            patch.setattr(generation, "PREFILL_CHUNK", 3)
            assert text_of(answer(loaded, task)) == whole
