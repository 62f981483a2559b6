"""An imported TinyGPT-V in chat: the family's own prompt with its task's tag, its pictures, its stop."""

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from api_schemas.imports import TinyGptvImport
from api_schemas.inference import ChatRequest
from compression.importers.chat_files import SYSTEM
from compression.importers.tinygptv import convert
from tests.compression.importers.tinygptv_originals import write_originals
from tests.image_chat_originals import QUERIES
from tests.tiny_vision_models import encoded, picture
from tests.workers.inference.server import InferenceServer
from tests.workers.inference.test_vision_server import parts, url_of
from workers.inference.generation import generate
from workers.inference.images.reading import ImageFile
from workers.inference.loading import LoadedModel, load, plan_load
from workers.inference.prompts import chat_task
from workers.inference.registry import ModelSource
from workers.inference.tasks import GenerationTask

QUESTION = "[vqa] what colour is the left half?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    originals = write_originals(root)
    paths = {role: str(path) for role, path in originals.paths.items()}
    convert(TinyGptvImport.model_validate({"family": "tinygptv", **paths, **originals.options}), root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(plan_load(ModelSource("tgv", folder, 1.0)))


def task(loaded: LoadedModel, seed: int, **values: Any) -> GenerationTask:
    content = parts(url_of(b""), text=QUESTION)
    body = {"model": "tgv", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    file = ImageFile("messages.0.content.0", encoded(picture(seed)), 10**6)
    return chat_task(loaded, ChatRequest.model_validate(body | values), (file,))


def test_the_prompt_is_the_familys_with_the_tag_in_it(loaded: LoadedModel) -> None:
    asked = task(loaded, 1)
    mark = loaded.model.config.image_token_id
    assert asked.prompt.count(mark) == QUERIES
    start = asked.prompt.index(mark)
    before, after = (
        loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (f"{SYSTEM}###Human: <Img>", f"</Img> {QUESTION}###Assistant: ")
    )
    assert asked.prompt[:start] == before
    assert asked.prompt[start + QUERIES :] == after
    assert asked.stops == ("###",)
    assert task(loaded, 1, stop=["."]).stops == (".", "###")


def test_an_answer_ends_where_the_family_ends_it(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a text with `###` in it, as the model would sample them."""
    told = iter(loaded.tokenizer("blue ### Human", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("workers.inference.sampling.Sampler.pick", lambda *_: next(told))
    pieces = list(generate(loaded, task(loaded, 1), lambda: False))
    assert "".join(piece.text for piece in pieces).strip() == "blue"
    assert pieces[-1].finish_reason == "stop"


@torch.inference_mode()
def test_two_pictures_are_two_different_things(loaded: LoadedModel) -> None:
    logits = []
    for seed in (1, 2):
        asked = task(loaded, seed)
        logits.append(loaded.model(input_ids=torch.tensor([asked.prompt]), **asked.pictures).logits[0, -1].float())
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[0].abs().max()


@pytest.mark.servers
def test_over_http(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    with InferenceServer(tmp_path / "home") as server:
        server.register("tgv", folder)
        url = url_of(encoded(picture(1)))
        said = server.openai.chat.completions.create(
            model="tgv",
            messages=[{"role": "user", "content": parts(url, text=QUESTION)}],
            temperature=0,
            max_tokens=8,
        )
        pieces = generate(loaded, task(loaded, 1), lambda: False)
        assert said.choices[0].message.content == "".join(piece.text for piece in pieces)
        with pytest.raises(openai.BadRequestError, match="ImageHere"):
            server.openai.chat.completions.create(
                model="tgv", messages=[{"role": "user", "content": "<Img><ImageHere></Img> what is this?"}]
            )
