"""A vision-language model from its registration to an answer, through the API and the stock client."""

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api
from tests.tiny_vision_models import encoded, make_tiny_vision_model, picture
from tests.workers.inference.server import InferenceServer

URL = "data:image/png;base64," + base64.b64encode(encoded(picture(1))).decode()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    """An API with an inference process behind it, where `eyes` is registered."""
    home = tmp_path_factory.mktemp("seeing")
    folder = make_tiny_vision_model(tmp_path_factory.mktemp("eyes") / "eyes")
    with InferenceServer(home) as inference:
        with running_api(home, inference_url=inference.url, model_roots=str(folder.parent)) as api:
            with api.client() as client:
                answer = client.post("/v1/models", json={"name": "eyes", "path": str(folder)})
                assert answer.status_code == 201, answer.text
            yield api


@pytest.fixture
def client(seeing: RunningApi) -> Iterator[httpx.Client]:
    with seeing.client() as client:
        yield client


def message(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def test_the_models_list_advertises_what_it_reads(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["capabilities"]["input_modalities"] == ["text", "image"]
    assert model["capabilities"]["output_modalities"] == ["text"]
    assert {"chat", "completion"} <= set(model["capabilities"]["tasks"])
    facts = model["facts"]
    assert facts["reads_images"] is True
    assert (facts["context_length"], facts["dtype"]) == (1024, "F32")
    assert facts["bytes"] == 4 * facts["parameters"]


def test_the_stock_client_sends_an_image_and_streams(seeing: RunningApi) -> None:
    request: dict[str, Any] = {"model": "eyes", "messages": message(URL), "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key=seeing.key, max_retries=0) as stock:
        whole = stock.chat.completions.create(**request)
        chunks = list(stock.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
        other = base64.b64encode(encoded(picture(2))).decode()
        answer = stock.chat.completions.create(**{**request, "messages": message(f"data:;base64,{other}")})
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.prompt_tokens > 16  # of the image alone
    assert answer.choices[0].message.content != told


def test_refusals_pass_through_with_their_place(client: httpx.Client) -> None:
    body = {"model": "eyes", "messages": message("http://169.254.169.254/latest/meta-data")}
    error = error_of(client.post("/v1/chat/completions", json=body), 400, "image_host_not_allowed")
    assert error["param"] == "messages.0.content.1"
    body = {"model": "eyes", "messages": message(URL[:60])}
    error_of(client.post("/v1/chat/completions", json=body), 400, "image_damaged")


def test_a_part_of_another_shape_is_named_by_its_field(client: httpx.Client) -> None:
    parts = [{"type": "image_url", "image_url": {"url": URL, "detail": "high"}}]
    body = {"model": "eyes", "messages": [{"role": "user", "content": parts}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "messages.0.content.0.image_url.detail"
