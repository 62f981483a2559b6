"""Answers by onnxruntime: equal to those of the weights, streamed too; an engine that is absent is refused by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_schemas.errors import InvalidCheckpoint, InvalidRequest
from api_schemas.exports.onnx import OnnxExport
from compression.exporters.onnx.export import write_onnx
from compression.exporters.onnx.texts import Texts
from preflight.checkpoint import describe, open_checkpoint
from preflight.engines import engines_of
from tests.compression.walks import random_tokens
from tests.tiny_models import make_tiny_model
from tests.workers.inference.server import InferenceServer
from workers.inference.generation import generate
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource
from workers.inference.sampling import SamplingChoice
from workers.inference.tasks import GenerationTask

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a graph in float32 and one in 8 bits."""
    folder = make_tiny_model(tmp_path_factory.mktemp("graphs") / "tiny", "llama", tied=True, hidden=64, intermediate=96)
    texts = Texts(random_tokens(1, 32), random_tokens(1, 32, seed=1))
    for weights in ("float32", "int8"):
        export = OnnxExport(format="onnx", weights=weights, inputs="block")
        write_onnx(folder, folder / export.target, export, texts)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServer]:
    with InferenceServer(tmp_path_factory.mktemp("home")) as running:
        running.register("tiny", model)
        yield running


def written(source: ModelSource, prompt: list[int]) -> str:
    task = GenerationTask(prompt, 24, SamplingChoice(temperature=0.0), (), continues_prompt=True)
    return "".join(piece.text for piece in generate(load(plan_load(source)), task, lambda: False))


def chat(server: InferenceServer, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 12, **more}
    return server.http.post("/v1/chat/completions", json=body)


def test_a_graph_writes_what_the_weights_write(model: Path) -> None:
    """A prompt longer than one piece of reading, so that the cache carries over."""
    prompt = random_tokens(1, 600 - 120, seed=3)[0].tolist()
    own = ModelSource("tiny", model, 1.0)
    assert written(own.answered_by("onnx-float32"), prompt) == written(own, prompt) != ""
    graph = load(plan_load(own.answered_by("onnx-int8")))
    weights = load(plan_load(own))
    assert (graph.eos_ids, graph.vocabulary, graph.context_length) == (
        weights.eos_ids,
        weights.vocabulary,
        weights.context_length,
    )
    assert graph.bytes < weights.bytes
    assert "onnx-int8: onnxruntime" in graph.precision.reason


def test_the_server_answers_by_the_engine_that_is_asked_for(server: InferenceServer) -> None:
    own, graph = chat(server).json(), chat(server, engine="onnx-float32").json()
    assert own["choices"] == graph["choices"]
    assert (own.get("system_fingerprint"), graph["system_fingerprint"]) == (None, "onnx-float32")
    streamed = server.openai.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0.0,
        max_tokens=12,
        stream=True,
        extra_body={"engine": "onnx-float32"},
    )
    chunks = list(streamed)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == own["choices"][0]["message"]["content"]
    assert {chunk.system_fingerprint for chunk in chunks} == {"onnx-float32"}
    assert chat(server, engine="onnx-int8").status_code == 200
    held = {entry["engine"]: entry for entry in server.http.get("/loaded").json()["data"]}
    assert set(held) == {"transformers", "onnx-float32", "onnx-int8"}
    assert held["onnx-int8"]["bytes"] < held["onnx-float32"]["bytes"]


def test_log_probabilities_of_a_graph_are_those_of_the_weights(server: InferenceServer) -> None:
    own, graph = (
        chat(server, engine=engine, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        for engine in ("transformers", "onnx-float32")
    )
    assert [one["token"] for one in own] == [one["token"] for one in graph]
    assert [one["logprob"] for one in own] == pytest.approx([one["logprob"] for one in graph], abs=1e-4)
    assert {len(one["top_logprobs"]) for one in graph} == {2}


def test_several_answers_of_a_graph_are_those_of_the_weights(server: InferenceServer) -> None:
    asked = {"n": 3, "seed": 5, "temperature": 1.0}
    own, graph = (chat(server, engine=engine, **asked).json() for engine in ("transformers", "onnx-float32"))
    assert own["choices"] == graph["choices"]
    assert len({choice["message"]["content"] for choice in graph["choices"]}) == 3


def test_an_engine_that_is_not_there_is_refused_with_those_that_are(server: InferenceServer) -> None:
    refused = chat(server, engine="onnx-int4")
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("engine_not_found", "engine")
    assert "it has transformers, onnx-float32, onnx-int8" in error["message"]
    unknown = chat(server, engine="llama.cpp")
    assert unknown.status_code in (400, 422)
    assert "engine" in unknown.text


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "damaged", "llama")
    graph = folder / "exports" / "onnx-int8"
    graph.mkdir(parents=True)
    (graph / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidCheckpoint) as caught:
        load(plan_load(ModelSource("damaged", folder, 1.0).answered_by("onnx-int8")))
    assert caught.value.code == "model_load_failed"
    with pytest.raises(InvalidRequest, match="it has transformers, onnx-int8"):
        ModelSource("damaged", folder, 1.0).answered_by("onnx-float32")


def test_what_can_answer_is_among_the_facts(model: Path) -> None:
    assert engines_of(model) == ("transformers", "onnx-float32", "onnx-int8")
    assert describe(open_checkpoint(model)).engines == engines_of(model)
