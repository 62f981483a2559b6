"""Every error is the four-key object; the message names field, value and remedy."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event

from job_store.database import upgrade
from job_store.settings import Settings
from service.app import create_app
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi

RECIPE: dict[str, Any] = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}
STEP = RECIPE["steps"][0]
GPTQ = {"method": "gptq"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def ask(app: FastAPI, method: str, path: str, key: str = "x", body: object = None) -> httpx.Response:
    """Send one request to an app in this process, and close what the app opened for it."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.request(method, path, headers={"authorization": f"Bearer {key}"}, json=body)
        await app.state.stores.inference.aclose()
        app.state.stores.engine.dispose()
        return answer

    return asyncio.run(send())


def job(**changes: object) -> dict[str, Any]:
    return {"model": "tiny", "recipe": {**RECIPE, **changes}}


@pytest.mark.parametrize(
    ("route", "body", "code", "param", "shown"),
    [
        ("compression/jobs", {}, "missing_field", "model", "model is missing"),
        ("compression/jobs", {"model": "tiny"}, "missing_field", "recipe", "recipe is missing"),
        ("compression/jobs", job(extra=1), "unknown_field", "recipe.extra", "value 1"),
        ("compression/jobs", job(steps=[]), "invalid_value", "recipe.steps", "at least 1 item"),
        ("compression/jobs", job(steps=[STEP, STEP]), "invalid_value", "recipe.steps", "two of one kind"),
        ("compression/jobs", job(steps=[GPTQ, STEP]), "invalid_value", "recipe.steps", "put 'modegpt' before 'gptq'"),
        ("compression/jobs", job(steps=[{**GPTQ, "bits": 3}]), "invalid_value", "recipe.steps.0.bits", "not 3"),
        ("compression/jobs", job(steps=[STEP, {}]), "missing_field", "recipe.steps.1.method", "is missing"),
        ("compression/jobs", job(steps=[STEP, {**GPTQ, "ranks": 1}]), "unknown_field", "recipe.steps.1.ranks", "1"),
        ("compression/jobs", job(steps=[{**STEP, "sparsity": 2}]), "invalid_value", "recipe.steps.0.sparsity", "not 2"),
        ("compression/jobs", job(steps=[{**STEP, "sparsity": 0}]), "invalid_value", "recipe.steps.0.sparsity", "not 0"),
        ("compression/jobs", job(steps=[{**STEP, "sparsity": -1}]), "invalid_value", "recipe.steps.0.sparsity", "-1"),
        ("compression/jobs", job(steps=[{**STEP, "sparsity": "x"}]), "invalid_value", "recipe.steps.0.sparsity", "'x'"),
        (
            "compression/jobs",
            job(steps=[{**STEP, "sparsity": None}]),
            "invalid_value",
            "recipe.steps.0",
            "exactly one of sparsity",
        ),
        (
            "compression/jobs",
            job(steps=[{**STEP, "sparsity": None, "target": {"bytes": "8 gigs"}}]),
            "invalid_value",
            "recipe.steps.0.target.bytes",
            "as in '8 GB'",
        ),
        ("compression/jobs", job(steps=[{**STEP, "sparsty": 1}]), "unknown_field", "recipe.steps.0.sparsty", "value 1"),
        ("compression/jobs", job(steps=[{**STEP, "method": "x"}]), "invalid_value", "recipe.steps.0.method", "'x'"),
        ("compression/jobs", job(steps=[{**STEP, "layout": "x"}]), "invalid_value", "recipe.steps.0.layout", "'x'"),
        (
            "compression/jobs",
            job(steps=[{**STEP, "allocation": "block_influence"}]),
            "invalid_value",
            "recipe.steps.0",
            "layout 'portable' needs",
        ),
        (
            "compression/jobs",
            job(calibration={"source": "file"}),
            "invalid_value",
            "recipe.calibration",
            "needs 'path'",
        ),
        (
            "compression/jobs",
            job(calibration={"num_samples": 0}),
            "invalid_value",
            "recipe.calibration.num_samples",
            "0",
        ),
        ("compression/jobs", job(seed=-1), "invalid_value", "recipe.seed", "-1"),
        (
            "compression/jobs",
            job(gate={"perplexity_increase": 0}),
            "invalid_value",
            "recipe.gate.perplexity_increase",
            "0",
        ),
        ("compression/jobs", {**job(), "metadata": {"k": 1}}, "invalid_value", "metadata.k", "not 1"),
        ("compression/jobs", {**job(), "metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata", "16"),
        ("compression/jobs", {**job(), "suffix": "../x"}, "invalid_value", "suffix", "'../x'"),
        ("compression/plans", {"model": "", "recipe": RECIPE}, "invalid_value", "model", "''"),
        ("uploads", {"filename": "", "purpose": "model", "bytes": 1}, "invalid_value", "filename", "''"),
        ("uploads", {"filename": "a\0b", "purpose": "model", "bytes": 1}, "invalid_value", "filename", "'a\\x00b'"),
        ("uploads", {"filename": "x", "purpose": "y", "bytes": 1}, "invalid_value", "purpose", "'y'"),
        ("uploads", {"filename": "x", "purpose": "model", "bytes": -1}, "invalid_value", "bytes", "-1"),
        ("uploads", {"filename": "x", "purpose": "model", "bytes": 1.5}, "invalid_value", "bytes", "1.5"),
        ("uploads", {"filename": "x", "purpose": "model", "bytes": 1, "sha256": "x"}, "invalid_value", "sha256", "'x'"),
        ("models", {"name": "../x", "path": "/x"}, "invalid_value", "name", "'../x'"),
        ("models", {"name": "x"}, "invalid_value", None, "exactly one of files, path, hub_id and originals"),
        ("models", {"name": "x", "originals": {"family": "none"}}, "invalid_value", "originals.family", "'tinygptv'"),
        ("models", {"name": "x", "hub_id": "../../etc"}, "invalid_value", "hub_id", "'../../etc'"),
        ("models", {"name": "x", "files": [{"file_id": "f"}]}, "missing_field", "files.0.path", "is missing"),
        ("chat/completions", {**CHAT, "messages": []}, "invalid_value", "messages", "at least 1"),
        ("chat/completions", {**CHAT, "temperature": 3}, "invalid_value", "temperature", "not 3"),
        ("chat/completions", {**CHAT, "logit_bias": {}}, "unknown_field", "logit_bias", "{}"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "missing_field",
            "messages.0.content.0.text",
            "is missing",
        ),
        ("completions", {"model": "tiny"}, "missing_field", "prompt", "is missing"),
        ("uploads", [], "invalid_value", None, "not []"),
        ("uploads", "text", "invalid_value", None, "not 'text'"),
        ("uploads", {"filename": "\ud800", "purpose": "model", "bytes": 1}, "invalid_value", "filename", "\\ud800"),
        ("uploads", {"\ud800": 1, "filename": "x", "purpose": "model", "bytes": 1}, "invalid_value", None, "\\ud800"),
    ],
)
def test_wrong_values(client: httpx.Client, route: str, body: object, code: str, param: str | None, shown: str) -> None:
    content = json.dumps(body)
    answer = client.post(f"/v1/{route}", content=content, headers={"content-type": "application/json"})
    error = error_of(answer, 422, code)
    assert error["param"] == param
    assert shown in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"nul", b"[" * 100_000])
def test_bodies_that_are_not_json(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/uploads", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    error_of(answer, answer.status_code, answer.json()["error"]["code"])


def test_json_under_another_name_is_refused(client: httpx.Client) -> None:
    """A web page can send text/plain to loopback without asking; it must not count as JSON."""
    body = b'{"filename":"x","purpose":"model","bytes":1}'
    answer = client.post("/v1/uploads", content=body, headers={"content-type": "text/plain"})
    error_of(answer, 422, "invalid_value")


def test_numbers_that_are_none(client: httpx.Client) -> None:
    for value in ("NaN", "Infinity", "1e999"):
        body = json.dumps(job(steps=[{**STEP, "sparsity": "?"}])).replace('"?"', value)
        answer = client.post(
            "/v1/compression/jobs", content=body.encode(), headers={"content-type": "application/json"}
        )
        assert error_of(answer, 422, "invalid_value")["param"] == "recipe.steps.0.sparsity"


def test_a_long_value_is_cut_in_the_message(client: httpx.Client) -> None:
    answer = client.post("/v1/uploads", json={"filename": "x" * 10_000, "purpose": "model", "bytes": 1})
    assert len(error_of(answer, 422, "invalid_value")["message"]) < 400


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    answer = client.post("/v1/compression/jobs", json={"model": "x" * 300_001, "recipe": RECIPE})
    assert "300000 bytes" in error_of(answer, 413, "body_too_large")["message"]


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    for route in ("/v1/none", "/none", "/v1/models/a/b", "/v1//models", "/v1/models/"):
        error_of(client.get(route), 404, "route_not_found")
    answer = client.put("/v1/models")
    assert "PUT" in error_of(answer, 405, "method_not_allowed")["message"]
    assert answer.headers["allow"]


@pytest.mark.parametrize("hostile", ["none", "..%2F..%2Fetc%2Fpasswd", "%00", "%ff", "a" * 5000, "%E2%80%AE"])
def test_hostile_ids_are_not_found(client: httpx.Client, hostile: str) -> None:
    assert client.get(f"/v1/models/{hostile}").status_code == 404
    assert client.delete(f"/v1/models/{hostile}").status_code == 404
    for prefix in ("files", "uploads", "compression/jobs"):
        assert client.get(f"/v1/{prefix}/{hostile}").status_code == 404
    for route in ("events", "report"):
        assert client.get(f"/v1/compression/jobs/{hostile}/{route}").status_code == 404


@pytest.mark.parametrize(
    "query", ["models?limit=0", "models?limit=x", "files?limit=10001", "compression/jobs?limit=101", "files?purpose=x"]
)
def test_wrong_queries(client: httpx.Client, query: str) -> None:
    answer = client.get(f"/v1/{query}")
    assert error_of(answer, 422, "invalid_value")["param"] == query.split("?")[1].split("=")[0]


def test_problem_documents_on_request(client: httpx.Client) -> None:
    answer = client.get("/v1/models/none", headers={"accept": "application/problem+json"})
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code == 404
    assert problem["type"] == "urn:modepress:error:model_not_found"
    assert problem["detail"] == problem["error"]["message"]
    assert problem["instance"] == "/v1/models/none"


def test_request_ids(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for wrong in ("a b", "x" * 200, "ü".encode()):
        assert client.get("/healthz", headers={"x-request-id": wrong}).headers["x-request-id"].startswith("req_")
    assert int(client.get("/healthz").headers["openai-processing-ms"]) >= 0


def test_a_failure_of_ours_tells_nothing(api: RunningApi) -> None:
    """An exception nobody expected becomes a 500 without its text; the log has it under the request id."""
    app = create_app(api.settings())

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret detail")

    answer = ask(app, "GET", "/broken")
    error = error_of(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert error["type"] == "server_error"


def test_a_database_that_is_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    url = "postgresql://nobody:x@127.0.0.1:1/none?connect_timeout=2"
    settings = Settings(home=tmp_path_factory.mktemp("away"), database_url=url)

    answer = ask(create_app(settings), "GET", "/v1/models")
    error_of(answer, 503, "database_unavailable")
    assert answer.headers["retry-after"]
    ready = ask(create_app(settings), "GET", "/readyz").json()
    assert ready["checks"]["database"]["ok"] is False
    error_of(ask(create_app(settings), "GET", "/metrics"), 503, "database_unavailable")


def test_a_database_that_is_full(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SQLite itself says so once it may not grow."""
    app = create_app(Settings(home=tmp_path_factory.mktemp("full"), broker_url="redis://127.0.0.1:1/0"))
    stores = app.state.stores
    stores.layout.prepare()
    upgrade(stores.engine)
    key = stores.keys.create("test").secret

    def cap(connection: Any, *_: object) -> None:
        connection.execute("PRAGMA max_page_count=1")  # SQLite takes the present size, so nothing more fits

    event.listen(stores.engine, "checkout", cap)
    for number in range(200):
        answer = ask(app, "POST", "/v1/uploads", key, {"filename": "x" * 500, "purpose": "model", "bytes": number})
        if answer.status_code != 200:
            break
    error_of(answer, 507, "disk_full")
