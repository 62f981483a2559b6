"""Limits per key: requests per minute and at a time, in memory and shared through Redis; what answers say of them."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api_schemas.quotas import Quota
from job_store.database import make_engine
from job_store.keys import KeyStore
from job_store.quotas import QuotaStore
from job_store.settings import Settings
from service.traffic import FORGET_SECONDS, Traffic
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api

RECIPE = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}


@pytest.fixture(params=["memory", "redis"])
def broker(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "memory" else str(request.getfixturevalue("redis_url"))


def test_a_minute_holds_so_many_requests(broker: str | None) -> None:
    traffic, key = Traffic(broker), secrets.token_hex(4)

    async def ask() -> list[tuple[bool, int]]:
        found = [await traffic.hit(key, 3) for _ in range(5)]
        assert all(0 < standing.reset_seconds <= 60 for standing in found)
        assert (await traffic.hit("another", 3)).allowed
        return [(standing.allowed, standing.remaining) for standing in found]

    assert asyncio.run(ask()) == [(True, 2), (True, 1), (True, 0), (False, 0), (False, 0)]


def test_slots_are_taken_and_given_back(broker: str | None) -> None:
    traffic, key = Traffic(broker), secrets.token_hex(4)

    async def ask() -> None:
        first, second = await traffic.enter(key, 2), await traffic.enter(key, 2)
        assert first is not None
        assert second is not None
        assert await traffic.enter(key, 2) is None
        await traffic.leave(key, first)
        assert await traffic.enter(key, 2) is not None
        assert await traffic.enter(key, 2) is None

    asyncio.run(ask())


def test_processes_share_what_they_count(redis_url: str) -> None:
    one, other, key = Traffic(redis_url), Traffic(redis_url), secrets.token_hex(4)

    async def ask() -> None:
        assert (await one.hit(key, 2)).remaining == 1
        assert (await other.hit(key, 2)).remaining == 0
        assert await one.enter(key, 1) is not None
        assert await other.enter(key, 1) is None

    asyncio.run(ask())


def test_slots_of_a_dead_process_are_free_again(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, key = Traffic(redis_url), secrets.token_hex(4)
    assert asyncio.run(traffic.enter(key, 1)) is not None
    assert asyncio.run(traffic.enter(key, 1)) is None
    now = time.time()
    monkeypatch.setattr("service.traffic.time.time", lambda: now + FORGET_SECONDS + 1)
    assert asyncio.run(traffic.enter(key, 1)) is not None


def test_without_redis_each_process_counts_alone() -> None:
    traffic = Traffic("redis://127.0.0.1:1/0")

    async def ask() -> list[bool]:
        return [(await traffic.hit("k", 2)).allowed for _ in range(4)]

    # the one that found Redis away is counted in memory too
    assert asyncio.run(ask()) == [True, True, False, False]


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, redis_url: str, tiny_folder: Path) -> Iterator[RunningApi]:
    home = tmp_path_factory.mktemp("limited")
    limits = {"owner_max_jobs": "1", "model_roots": str(tiny_folder.parent), "inference_url": "http://127.0.0.1:1"}
    with running_api(home, broker_url=redis_url, **limits) as api:
        yield api


def _client(api: RunningApi, owner: str, **limits: int) -> httpx.Client:
    engine = make_engine(api.settings().resolved_database_url)
    secret = KeyStore(engine).create("k", owner=owner, **limits).secret
    engine.dispose()
    return httpx.Client(base_url=api.url, headers={"authorization": f"Bearer {secret}"}, trust_env=False, timeout=60)


def test_answers_say_how_much_is_left(limited: RunningApi) -> None:
    with _client(limited, "anna", requests_per_minute=3) as client:
        answers = [client.get("/v1/models") for _ in range(4)]
    headers = answers[0].headers
    assert headers["ratelimit-policy"] == '"requests";q=3;w=60'
    assert headers["ratelimit"].startswith('"requests";r=2;t=')
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "2")
    error = error_of(answers[3], 429, "rate_limit_exceeded")
    assert (error["type"], error["param"]) == ("rate_limit_error", "Authorization")
    assert "--per-minute" in error["message"]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 60
    assert "r=0;" in answers[3].headers["ratelimit"]


def test_an_open_stream_takes_a_slot(limited: RunningApi, tiny_folder: Path) -> None:
    with _client(limited, "carl", concurrent_requests=1) as client:
        model = client.post("/v1/models", json={"name": "carls", "path": str(tiny_folder)}).json()["id"]
        job = client.post("/v1/compression/jobs", json={"model": model, "recipe": RECIPE}).json()["id"]
        with client.stream("GET", f"/v1/compression/jobs/{job}/events?stream=true") as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = client.get("/v1/models")
            error = error_of(answer, 429, "concurrency_limit_exceeded")
            assert "--at-once" in error["message"]
            assert answer.headers["retry-after"] == "1"
        _until_ok(client)
        assert {client.get("/v1/models").status_code for _ in range(100)} == {200}  # one after another is one at a time


def _until_ok(client: httpx.Client) -> None:
    """The server learns of the closed connection a moment later."""
    deadline = time.monotonic() + 20
    while client.get("/v1/models").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_quotas_are_refused_by_name_and_leave_nothing_behind(limited: RunningApi, tiny_folder: Path) -> None:
    engine = make_engine(limited.settings().resolved_database_url)
    quotas = QuotaStore(engine, Settings().quota)
    quotas.set("dora", Quota(bytes=1000, tokens=0))
    with _client(limited, "dora") as client:
        state = client.get("/v1/quota").json()
        assert (state["owner"], state["limits"]) == ("dora", {"bytes": 1000, "jobs": 1, "tokens": 0})
        error = error_of(
            client.post("/v1/uploads", json={"filename": "x", "purpose": "model", "bytes": 1001}),
            403,
            "byte_quota_exceeded",
        )
        assert (error["param"], error["type"]) == ("bytes", "permission_error")
        before = sorted(limited.home.glob("blobs/??/*"))
        sent = client.post("/v1/files", files={"file": ("a", secrets.token_bytes(1001))}, data={"purpose": "model"})
        error_of(sent, 403, "byte_quota_exceeded")
        assert sorted(limited.home.glob("blobs/??/*")) == before
        assert list(limited.home.glob("tmp/*")) == []
        model = client.post("/v1/models", json={"name": "doras", "path": str(tiny_folder)}).json()["id"]
        body = {"model": model, "recipe": RECIPE}
        error_of(client.post("/v1/compression/jobs", json=body), 403, "byte_quota_exceeded")
        quotas.set("dora", Quota(bytes=10**9))
        assert client.post("/v1/compression/jobs", json=body).status_code == 202
        second = client.post("/v1/compression/jobs", json=body)
        assert error_of(second, 429, "job_quota_exceeded")["param"] == "model"
        assert second.headers["retry-after"] == "60"
        chat = client.post("/v1/completions", json={"model": model, "prompt": "x"})
        error_of(chat, 429, "token_quota_exceeded")
        assert 1 <= int(chat.headers["retry-after"]) <= 86400
    engine.dispose()
