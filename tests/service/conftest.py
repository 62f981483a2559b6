"""One running API for most tests, over Redis and SQLite, with a tiny model registered in it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.running_api import RunningApi, running_api
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-block Llama with tokenizer and chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory, redis_url: str, tiny_folder: Path) -> Iterator[RunningApi]:
    """An API with keys, a broker, small limits and no inference process; `tiny` is registered."""
    home = tmp_path_factory.mktemp("api")
    limits = {"max_part_bytes": "1000000", "max_file_bytes": "2000000", "max_body_bytes": "300000"}
    limits["inference_url"] = "http://127.0.0.1:1"  # nobody listens there
    with running_api(home, broker_url=redis_url, model_roots=str(tiny_folder.parent), **limits) as api:
        with api.client() as client:
            answer = client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)})
            assert answer.status_code == 201, answer.text
        yield api


@pytest.fixture
def client(api: RunningApi) -> Iterator[httpx.Client]:
    """A client with a valid key."""
    with api.client() as client:
        yield client
