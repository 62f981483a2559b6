"""Images through a real inference process, asked by the stock `openai` client."""

import base64
import json

import openai
import pytest

from tests.compression.core.test_image_files import BOMBS
from tests.tiny_models import make_tiny_model
from tests.tiny_vision_models import encoded, make_tiny_vision_model, picture
from tests.workers.inference.server import InferenceServer
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

SERVED = ("llava", "smolvlm", "qwen2_vl")
ANSWER = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    made = {name: make_tiny_vision_model(root / name, name) for name in SERVED}
    return made | {"text": make_tiny_model(root / "text")}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    settings = {
        "MODEPRESS_MAX_IMAGES": "3",
        "MODEPRESS_MAX_IMAGE_BYTES": "40000",
        "MODEPRESS_MAX_IMAGE_PIXELS": "40000",
        "MODEPRESS_IMAGE_HOSTS": "localhost, 2130706433,127.0.0.1:22",
    }
    with InferenceServer(tmp_path_factory.mktemp("home"), **settings) as running:
        for name, folder in folders.items():
            running.register(name, folder)
        yield running


def url_of(data, head="data:image/png;base64,"):
    return head + base64.b64encode(data).decode()


def parts(*urls, text="What is this?"):
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def ask(server, model, *urls, **values):
    messages = [{"role": "user", "content": parts(*urls)}]
    return server.openai.chat.completions.create(model=model, messages=messages, **ANSWER, **values)


def refused(server, model, *urls, **values):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, model, *urls, **values)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    return caught.value


def stock_answer(folder, images):
    """What transformers answers by itself to the same picture, and the tokens it read."""
    loaded = load(plan_load(ModelSource("m", folder, 1.0)))
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": "What is this?"}]
    turns = [{"role": "user", "content": content}]
    text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = loaded.processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
    output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER["max_tokens"])
    read = inputs["input_ids"].shape[1]
    return loaded.tokenizer.decode(output[0, read:], skip_special_tokens=True).rstrip("\ufffd"), read


@pytest.mark.parametrize("model", SERVED)
@pytest.mark.parametrize("images", [1, 2])
def test_the_answer_is_what_transformers_gives(server, folders, model, images):
    pictures = [picture(seed) for seed in range(images)]
    answer = ask(server, model, *(url_of(encoded(one)) for one in pictures))
    text, read = stock_answer(folders[model], pictures)
    assert answer.choices[0].message.content == text
    assert answer.usage.prompt_tokens == read


@pytest.mark.parametrize("model", SERVED)
def test_streamed_pieces_join_to_the_whole_answer(server, model):
    url = url_of(encoded(picture(7), "JPEG"), "DATA:Image/JPEG;Base64,")
    whole = ask(server, model, url)
    chunks = list(ask(server, model, url, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("model", SERVED)
def test_the_answer_depends_on_the_images_and_their_order(server, model):
    one, other = url_of(encoded(picture(1))), url_of(encoded(picture(2)))
    answers = [ask(server, model, *urls).choices[0].message.content for urls in ((one, other), (other, one), (one,))]
    assert len(set(answers)) == 3


def test_text_alone_and_what_is_loaded(server):
    answer = server.openai.chat.completions.create(
        model="llava", messages=[{"role": "user", "content": "Hi"}], **ANSWER
    )
    assert answer.choices[0].message.content
    assert server.loaded()["llava"]["input_modalities"] == ["text", "image"]
    server.openai.chat.completions.create(model="text", messages=[{"role": "user", "content": "Hi"}], **ANSWER)
    assert server.loaded()["text"]["input_modalities"] == ["text"]


def test_completions_of_a_vision_model(server):
    assert server.openai.completions.create(model="qwen2_vl", prompt="The quick", max_tokens=4).choices[0].text


SOUND = url_of(encoded(picture(1)))
HOSTILE = [
    ("image_damaged", (url_of(encoded(picture(1))[:-50]),), 0),
    ("image_damaged", (SOUND, url_of(encoded(picture(1), "JPEG")[:60])), 1),
    ("image_format_not_supported", (url_of(b"<svg/>", "data:image/svg+xml;base64,"),), 0),
    ("image_too_many_pixels", (SOUND, url_of(BOMBS["png"])), 1),
    ("image_too_many_pixels", (url_of(BOMBS["webp extended"]),), 0),
    ("image_too_narrow", (url_of(encoded(picture(1, 300, 2))),), 0),
    ("image_too_large", (url_of(bytes(40_001)),), 0),
    ("image_too_large", (SOUND, url_of(b"\x89PNG\r\n\x1a\n" + bytes(39_900))), 1),
    ("invalid_image_url", ("data:image/png,abc",), 0),
    ("invalid_image_url", ("file:///etc/passwd",), 0),
    ("invalid_image_url", ("x",), 0),
    ("image_host_not_allowed", ("http://127.0.0.1/x.png",), 0),
    ("image_host_not_allowed", ("http://[::1]/x.png",), 0),
    ("image_host_not_allowed", ("http://169.254.169.254/latest/meta-data",), 0),
    ("image_host_not_allowed", ("https://example.org/x.png",), 0),
    ("image_address_not_allowed", ("http://localhost/x.png",), 0),
    ("image_address_not_allowed", ("http://2130706433/x.png",), 0),
    ("image_address_not_allowed", (SOUND, "http://127.0.0.1:22/"), 1),
]


@pytest.mark.parametrize(("code", "urls", "at"), HOSTILE)
@pytest.mark.parametrize("stream", [False, True])
def test_hostile_images_are_named_before_the_first_byte(server, code, urls, at, stream):
    error = refused(server, "llava", *urls, stream=stream)
    place = f"messages.0.content.{at}"
    assert (error.code, error.param) == (code, place)
    assert error.body["message"].startswith(place)


def test_too_many_images(server):
    error = refused(server, "llava", *[SOUND] * 4)
    assert (error.code, error.param) == ("too_many_images", "messages")
    assert "MODEPRESS_MAX_IMAGES" in error.body["message"]


def test_images_count_towards_the_context(server, folders):
    copy = folders["llava"].parent / "short"
    if not copy.exists():
        make_tiny_vision_model(copy)
        config = json.loads((copy / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = 54
        (copy / "config.json").write_text(json.dumps(config))
    server.register("short", copy)
    assert ask(server, "short", SOUND).usage.prompt_tokens < 54
    error = refused(server, "short", SOUND, SOUND)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")


def test_a_text_model_refuses_before_it_is_loaded(server):
    error = refused(server, "text", "http://127.0.0.1:1/x.png")
    assert (error.code, error.param) == ("images_not_supported", "messages.0.content.0")


def test_an_unknown_model_is_unknown_with_images_too(server):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server, "nobody", SOUND)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("image", "code", "field"),
    [
        ({"url": ""}, "invalid_value", ".url"),
        ({}, "invalid_value", ".url"),
        ({"url": 5}, "invalid_value", ".url"),
        (SOUND, "invalid_value", ""),
        ({"url": SOUND, "detail": "high"}, "invalid_value", ".detail"),
        ({"url": SOUND, "size": 3}, "unknown_field", ".size"),
    ],
    ids=["empty", "none", "number", "string", "detail", "unknown"],
)
def test_image_parts_of_another_shape(server, image, code, field):
    content = [{"type": "image_url", "image_url": image}]
    body = {"model": "llava", "messages": [{"role": "user", "content": content}]}
    response = server.http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == (code, f"messages.0.content.0.image_url{field}")


def test_the_process_is_sound_after_all_that(server):
    assert "Traceback" not in server.log()
    assert ask(server, "llava", SOUND).choices[0].message.content
