"""Chat and completions through the API, answered by a real inference process; and what happens without one."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.servers import wait_until
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api
from tests.tiny_models import make_tiny_model
from tests.workers.inference.conftest import never_ending
from tests.workers.inference.server import InferenceServer

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True)
class Served:
    """An API and the inference process behind it."""

    api: RunningApi
    inference: InferenceServer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("served")
    endless = never_ending(make_tiny_model(tmp_path_factory.mktemp("endless") / "endless"))
    roots = f"{tiny_folder.parent}:{endless.parent}"
    with InferenceServer(home) as inference:
        with running_api(home, inference_url=inference.url, model_roots=roots) as api, api.client() as client:
            for name, folder in (("tiny", tiny_folder), ("endless", endless)):
                answer = client.post("/v1/models", json={"name": name, "path": str(folder)})
                assert answer.status_code == 201, answer.text
            yield Served(api, inference)


@pytest.fixture
def stock(served: Served) -> Iterator[openai.OpenAI]:
    """The stock client, pointed at the API."""
    with openai.OpenAI(base_url=f"{served.api.url}/v1", api_key=served.api.key, max_retries=0) as client:
        yield client


def test_the_stock_client_lists_models_and_chats(stock: openai.OpenAI) -> None:
    listed = {model.id: model for model in stock.models.list()}
    assert {"tiny", "endless"} <= set(listed)
    assert stock.models.retrieve("tiny").owned_by == "default"
    answer = stock.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=8, seed=1
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_stock_client_streams(stock: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = stock.chat.completions.create(**request)
    chunks = list(stock.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_the_stock_client_completes(stock: openai.OpenAI) -> None:
    answer = stock.completions.create(model="tiny", prompt="The quick brown", max_tokens=4, temperature=0)
    assert answer.object == "text_completion"


def test_answers_and_errors_of_the_inference_process_pass_unchanged(served: Served) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    bodies = (
        {**CHAT, "messages": [{"role": "user", "content": [image]}]},
        {**CHAT, "max_tokens": 4, "temperature": 0},
        {**CHAT, "messages": [{"role": "user", "content": "long " * 2000}]},
    )
    with served.api.client() as client:
        for body in bodies:
            ours = client.post("/v1/chat/completions", json=body)
            direct = served.inference.http.post("/v1/chat/completions", json=body)
            assert ours.status_code == direct.status_code
            volatile = ("id", "created")
            assert {key: value for key, value in ours.json().items() if key not in volatile} == {
                key: value for key, value in direct.json().items() if key not in volatile
            }


def test_tokens_are_counted_also_of_streams_and_of_those_cut_short(served: Served) -> None:
    with served.api.client() as client:

        def used() -> int:
            return int(client.get("/v1/quota").json()["used"]["tokens"])

        before = used()
        told = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 5, "seed": 1}).json()["usage"]
        assert used() - before == told["total_tokens"]
        before = used()
        streamed = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 5, "seed": 1, "stream": True})
        assert streamed.text.endswith(f": tokens {told['total_tokens']}\n\ndata: [DONE]\n\n")
        assert used() - before == told["total_tokens"]
        before = used()
        endless = {**CHAT, "model": "endless", "stream": True, "max_tokens": 500}
        with client.stream("POST", "/v1/chat/completions", json=endless) as answer:
            lines = answer.iter_lines()
            for _ in range(20):
                next(lines)
        wait_until(lambda: used() - before >= 10, what="the count of a stream cut short")
        client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 0})
        refused = used()
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "none"}).status_code == 404
        assert used() == refused


def test_unknown_and_unready_models_never_reach_it(client: httpx.Client) -> None:
    for route, body in (("chat/completions", CHAT), ("completions", {"model": "tiny", "prompt": "x"})):
        answer = client.post(f"/v1/{route}", json={**body, "model": "none"})
        assert error_of(answer, 404, "model_not_found")["param"] == "model"


def test_without_an_inference_process(client: httpx.Client) -> None:
    for route, body in (("chat/completions", CHAT), ("completions", {"model": "tiny", "prompt": "x"})):
        answer = client.post(f"/v1/{route}", json=body)
        error = error_of(answer, 503, "inference_unavailable")
        assert error["type"] == "server_error"
        assert answer.headers["retry-after"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_ends_the_generation(served: Served, stream: bool) -> None:
    """Closing the connection to the API stops the work in the process behind it."""
    address = httpx.URL(served.api.url)
    connection = http.client.HTTPConnection(address.host, address.port or 80, timeout=60)
    body = {**CHAT, "model": "endless", "max_tokens": 500_000, "temperature": 0, "stream": stream}
    headers = {"content-type": "application/json", "authorization": f"Bearer {served.api.key}"}

    def running() -> int:
        return int(served.inference.http.get("/loaded").json()["queue"]["running"])

    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    with closing(connection):
        wait_until(lambda: running() == 1, what="the generation to start")
        if stream:
            assert connection.getresponse().read(20)
    wait_until(lambda: running() == 0, what="the generation to end")
    with served.api.client() as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).status_code == 200


class DyingUpstream:
    """A process that begins to stream and dies: raw sockets, for no server of ours behaves so on purpose."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        with self._listener, self._listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(head + b"d\r\ndata: {}\n\n \n\r\n")


def test_an_upstream_that_dies_mid_stream_says_so_in_the_stream(tmp_path: Path, tiny_folder: Path) -> None:
    upstream = DyingUpstream()
    settings = {"inference_url": upstream.url, "model_roots": str(tiny_folder.parent)}
    with running_api(tmp_path / "home", **settings) as api, api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)})
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "inference_unavailable"
