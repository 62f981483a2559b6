"""Prompts: templates, roles, images and the room that is left."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from api_schemas.errors import InvalidRequest
from api_schemas.inference import ChatRequest, CompletionRequest, Message
from workers.inference.images.reading import image_parts
from workers.inference.prompts import chat_task, completion_task, refuse_images, render_chat

MESSAGES = TypeAdapter(list[Message])


def messages(*turns):
    return MESSAGES.validate_python([{"role": role, "content": content} for role, content in turns])


def chat(*turns, **values):
    return ChatRequest(model="m", messages=messages(*turns), **values)


def refusal(function, *arguments):
    with pytest.raises(InvalidRequest) as caught:
        function(*arguments)
    return caught.value


def test_the_models_own_template_is_used(tiny_loaded):
    text = render_chat(tiny_loaded["llama"].tokenizer, messages(("system", "Be brief."), ("user", "Hi")))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_prompt_gets_no_second_begin_token(tiny_loaded):
    task = chat_task(tiny_loaded["llama"], chat(("user", "Hi")))
    assert task.prompt.count(1) == 2  # one <|im_start|> per turn, as the template wrote them


def test_developer_is_system_unless_the_template_knows_the_role(tiny_loaded):
    tokenizer = tiny_loaded["llama"].tokenizer
    assert "<|im_start|>system\n" in render_chat(tokenizer, messages(("developer", "x")))
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{# knows developer #}" + original
        assert "<|im_start|>developer\n" in render_chat(tokenizer, messages(("developer", "x")))
    finally:
        tokenizer.chat_template = original


def test_text_parts_are_joined_by_lines(tiny_loaded):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in render_chat(tiny_loaded["llama"].tokenizer, messages(("user", parts)))


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,iVBORw0KGgo=",
        "DATA:Image/PNG;charset=utf-8;BASE64,iVBORw0KGgo",
        "http://127.0.0.1/x.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/x.png",
    ],
)
def test_an_image_is_refused_with_its_place_and_never_fetched(tiny_loaded, url):
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    places = [place for place, _ in image_parts(messages(("system", "x"), ("user", parts)))]
    error = refusal(refuse_images, tiny_loaded["llama"].source, places)
    assert (error.code, error.param, error.status) == ("images_not_supported", "messages.1.content.1", 400)


def test_text_that_mentions_an_image_is_text(tiny_loaded):
    said = "What does data:image/png;base64,iVBORw0KGgo= mean?"
    turns = messages(("user", said), ("user", [{"type": "text", "text": said}]))
    assert image_parts(turns) == []
    assert render_chat(tiny_loaded["llama"].tokenizer, turns).count(said) == 2


def test_a_model_without_template_points_to_completions(tiny_loaded):
    error = refusal(chat_task, tiny_loaded["bare"], chat(("user", "Hi")))
    assert error.code == "chat_template_missing"
    assert "/v1/completions" in error.message


def test_what_a_template_objects_to_is_told(tiny_loaded):
    tokenizer = tiny_loaded["llama"].tokenizer
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        error = refusal(render_chat, tokenizer, messages(("user", "a"), ("user", "b")))
    finally:
        tokenizer.chat_template = original
    assert (error.code, error.param) == ("chat_template_error", "messages")
    assert "roles must alternate" in error.message


def test_a_prompt_that_fills_the_context_is_refused_with_numbers(tiny_loaded):
    error = refusal(completion_task, tiny_loaded["llama"], CompletionRequest(model="m", prompt=[5] * 512))
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    assert error.message.count("512") == 2


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_asking_for_more_than_is_left_names_the_field_and_the_rest(tiny_loaded, name):
    error = refusal(chat_task, tiny_loaded["llama"], chat(("user", "Hi"), **{name: 512}))
    assert (error.code, error.param) == ("context_length_exceeded", name)
    assert "at most" in error.message


def test_limits_when_the_request_names_none(tiny_loaded):
    short = chat_task(tiny_loaded["llama"], chat(("user", "Hi")))
    assert short.max_tokens == 512 - len(short.prompt)
    assert chat_task(tiny_loaded["endless"], chat(("user", "Hi"))).max_tokens == 1024
    assert completion_task(tiny_loaded["llama"], CompletionRequest(model="m", prompt="Hi")).max_tokens == 16


def test_two_different_limits_are_refused(tiny_loaded):
    error = refusal(chat_task, tiny_loaded["llama"], chat(("user", "Hi"), max_tokens=3, max_completion_tokens=4))
    assert error.code == "conflicting_max_tokens"


def test_token_ids_are_taken_as_they_are_and_checked(tiny_loaded):
    assert completion_task(tiny_loaded["llama"], CompletionRequest(model="m", prompt=[5, 6])).prompt == [5, 6]
    error = refusal(completion_task, tiny_loaded["llama"], CompletionRequest(model="m", prompt=[5, 384]))
    assert (error.code, error.param) == ("invalid_token", "prompt.1")


def test_an_empty_prompt_is_the_begin_token(tiny_loaded):
    assert completion_task(tiny_loaded["llama"], CompletionRequest(model="m", prompt="")).prompt == [1]


@settings(deadline=None)
@given(prompt_tokens=st.integers(1, 511))
def test_prompt_and_answer_always_fit(tiny_loaded, prompt_tokens):
    request = CompletionRequest(model="m", prompt=[5] * prompt_tokens)
    assert prompt_tokens + completion_task(tiny_loaded["llama"], request).max_tokens <= 512
