"""Captions and answers about frames in chat: those of the published search, or a refusal by name."""

import base64

import httpx
import numpy as np
import pytest
import torch

from api_schemas.errors import InvalidRequest
from api_schemas.imports import MPlug2Import
from api_schemas.inference import ChatRequest, CompletionRequest
from compression.importers.mplug2 import convert
from preflight.checkpoint import describe, open_checkpoint
from tests import tiny_mplug2 as original
from tests.tiny_vision_models import encoded, picture
from tests.workers.inference.server import InferenceServer
from workers.inference.generation import generate
from workers.inference.images.reading import ImageFile
from workers.inference.loading import load, plan_load
from workers.inference.prompts import chat_task, completion_task
from workers.inference.registry import ModelSource

QUESTION = "what is it ?"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def references():
    return {
        "caption": original.random_weights(original.MPlug2(), seed=4),
        "question": original.random_weights(original.MPlug2(twins=True), seed=5),
    }


@pytest.fixture(scope="module")
def folders(references, tmp_path_factory):
    root = tmp_path_factory.mktemp("video")
    for task, reference in references.items():
        source = original.write_original(root / f"from-{task}", reference)
        places = {"checkpoint": "mPLUG2_tiny.pth", "bert_config": "config_bert.json", "tokenizer": "bert"}
        paths = {role: str(source / name) for role, name in places.items()}
        convert(MPlug2Import(family="mplug2", task=task, frames=4, **paths), root / task)
    return {task: root / task for task in references}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load(plan_load(ModelSource(name, folder, 1.0))) for name, folder in folders.items()}


def message(pictures, text=""):
    said = [{"type": "text", "text": text}] if text else []
    urls = ["data:image/png;base64," + base64.b64encode(encoded(one)).decode() for one in pictures]
    return [{"role": "user", "content": [*({"type": "image_url", "image_url": {"url": url}} for url in urls), *said]}]


def task_of(model, pictures, text="", **values):
    images = [ImageFile(f"messages.0.content.{i}", encoded(one), 10**6) for i, one in enumerate(pictures)]
    body = {"model": "m", "messages": message(pictures, text), **values}
    return chat_task(model, ChatRequest.model_validate(body), images)


def by_hand(pictures):
    """Pixels as the published evaluation makes them: nearest neighbours, the last frame again."""
    side = original.SIDE * original.PATCH
    frames = []
    for one in [*pictures, *[pictures[-1]] * (original.FRAMES - len(pictures))]:
        grid = np.asarray(one.convert("RGB"), dtype=np.float32)
        rows, columns = (np.arange(side) * length // side for length in grid.shape[:2])
        frames.append((grid[rows][:, columns] / 255 - MEAN) / DEVIATION)
    return torch.tensor(np.stack(frames), dtype=torch.float32).permute(3, 0, 1, 2)[None]


def said(model, tokens):
    words = tokens[1:]
    words = words[: words.index(original.END)] if original.END in words else words
    return model.tokenizer.decode(words).split("a video of")[-1].strip()


@pytest.mark.parametrize("count", [1, 3, 4])
@torch.inference_mode()
def test_a_caption_is_the_published_searchs(loaded, references, count):
    pictures = [picture(seed) for seed in range(count)]
    task = task_of(loaded["caption"], pictures)
    assert torch.allclose(task.pictures["pixel_values"], by_hand(pictures), atol=1e-5)
    (piece,) = generate(loaded["caption"], task, lambda: False)
    tokens = references["caption"].search(by_hand(pictures), 5, 4, 20)[0][1]
    assert piece.text == said(loaded["caption"], tokens)
    assert piece.tokens == len(tokens) - 1
    assert piece.finish_reason == ("stop" if original.END in tokens else "length")


@torch.inference_mode()
def test_an_answer_is_the_published_searchs_and_depends_on_the_question(loaded, references):
    pictures = [picture(seed) for seed in range(4)]
    answers = []
    for text, ids in ((QUESTION, [2, 8, 9, 10, 11, 3]), ("a red dog ?", [2, 5, 14, 13, 11, 3])):
        task = task_of(loaded["question"], pictures, text)
        assert task.prompt == ids
        (piece,) = generate(loaded["question"], task, lambda: False)
        question = torch.tensor([ids])
        tokens = references["question"].search(by_hand(pictures), 5, 4, 20, question, torch.ones_like(question))[0][1]
        assert piece.text == said(loaded["question"], tokens)
        answers.append(
            references["question"].logits(by_hand(pictures), torch.tensor([[2]]), question, torch.ones_like(question))
        )
    assert not torch.allclose(*answers)


@torch.inference_mode()
def test_a_limit_and_a_stop_end_an_answer(loaded):
    pictures = [picture(1)]
    (whole,) = generate(loaded["caption"], task_of(loaded["caption"], pictures), lambda: False)
    (short,) = generate(loaded["caption"], task_of(loaded["caption"], pictures, max_tokens=5), lambda: False)
    assert short.tokens <= 5
    stop = whole.text.split()[1]
    (cut,) = generate(loaded["caption"], task_of(loaded["caption"], pictures, stop=stop), lambda: False)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("model", "pictures", "text", "values", "code", "param"),
    [
        ("caption", 1, "what is it ?", {}, "part_not_read", "messages.0.content.1"),
        ("caption", 0, "", {"messages": [{"role": "user", "content": " "}]}, "frames_missing", "messages.0.content"),
        ("question", 1, "", {}, "question_missing", "messages.0.content"),
        ("question", 1, "what " * 40, {}, "context_length_exceeded", "messages.0.content"),
        ("question", 1, QUESTION, {"temperature": 0.7}, "sampling_not_supported", "temperature"),
        ("question", 1, QUESTION, {"top_p": 0.5}, "sampling_not_supported", "top_p"),
        ("question", 1, QUESTION, {"logprobs": True}, "sampling_not_supported", "logprobs"),
        ("question", 1, QUESTION, {"n": 2}, "sampling_not_supported", "n"),
    ],
)
def test_what_such_a_model_does_not_read_is_refused(loaded, model, pictures, text, values, code, param):
    with pytest.raises(InvalidRequest) as caught:
        task_of(loaded[model], [picture(seed) for seed in range(pictures)], text, **values)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_no_conversation_and_no_completion(loaded):
    turns = [{"role": "system", "content": "Be brief."}, *message([picture(1)], QUESTION)]
    with pytest.raises(InvalidRequest) as caught:
        chat_task(loaded["question"], ChatRequest.model_validate({"model": "m", "messages": turns}))
    assert (caught.value.code, caught.value.param) == ("one_message_only", "messages")
    with pytest.raises(InvalidRequest) as caught:
        completion_task(loaded["question"], CompletionRequest(model="m", prompt="a"))
    assert caught.value.code == "completion_not_supported"


def test_what_the_models_say_of_themselves(folders):
    facts = describe(open_checkpoint(folders["caption"]))
    assert (facts.modality, facts.reads_images, facts.has_chat_template) == ("image-text", True, True)
    assert "it can be served: chat takes one message with frames alone" in facts.warnings


def test_over_http_whole_and_in_a_stream(folders, loaded, tmp_path):
    pictures = [picture(seed) for seed in range(2)]
    (wanted,) = generate(loaded["question"], task_of(loaded["question"], pictures, QUESTION), lambda: False)
    body = {"model": "question", "messages": message(pictures, QUESTION)}
    with InferenceServer(tmp_path) as server:
        server.register("question", folders["question"])
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == wanted.text
        assert answer["usage"] == {
            "prompt_tokens": 6,
            "completion_tokens": wanted.tokens,
            "total_tokens": 6 + wanted.tokens,
        }
        chunks = server.openai.chat.completions.create(**body, stream=True)
        assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == wanted.text
