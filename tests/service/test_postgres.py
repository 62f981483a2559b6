"""The API over PostgreSQL: the same answers, hostile strings included."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service.errors_seen import error_of
from tests.service.running_api import running_api

BODY = {"model": "tiny", "recipe": {"steps": [{"method": "modegpt", "sparsity": 0.2}]}}


@pytest.fixture
def client(tmp_path: Path, postgres_database: str, redis_url: str, tiny_folder: Path) -> Iterator[httpx.Client]:
    settings = {"database_url": postgres_database, "broker_url": redis_url, "model_roots": str(tiny_folder.parent)}
    with running_api(tmp_path / "home", **settings) as api, api.client() as client:
        assert client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)}).status_code == 201
        yield client


def test_the_api_over_postgresql(client: httpx.Client) -> None:
    data = hashlib.shake_256(b"postgres").digest(80_000)
    upload = client.post("/v1/uploads", json={"filename": "x", "purpose": "model", "bytes": len(data)}).json()["id"]

    def send(number: int) -> str:
        piece = data[number * 10_000 : (number + 1) * 10_000]
        sent = client.post(f"/v1/uploads/{upload}/parts", data={"number": str(number)}, files={"data": piece})
        return str(sent.json()["id"])

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(send, range(8)))
    body = {"part_ids": parts, "sha256": hashlib.sha256(data).hexdigest()}
    file = client.post(f"/v1/uploads/{upload}/complete", json=body).json()["file"]
    assert client.get(f"/v1/files/{file['id']}/content").content == data
    assert client.delete(f"/v1/files/{file['id']}").status_code == 200

    job = client.post("/v1/compression/jobs", json={**BODY, "metadata": {"a": "b"}}, headers={"idempotency-key": "k"})
    again = client.post("/v1/compression/jobs", json={**BODY, "metadata": {"a": "b"}}, headers={"idempotency-key": "k"})
    assert (job.status_code, again.status_code) == (202, 200)
    found = client.get("/v1/compression/jobs", params={"metadata[a]": "b"}).json()["data"]
    assert [one["id"] for one in found] == [job.json()["id"]]
    assert client.get("/readyz").json()["checks"]["database"] == {"ok": True, "detail": "postgresql"}
    assert 'modepress_jobs{status="queued"} 1.0' in client.get("/metrics").text

    for route in ("models", "files", "uploads", "compression/jobs"):
        assert client.get(f"/v1/{route}/%00").status_code == 404
        assert client.get(f"/v1/{route}", params={"after": "\0"}).status_code in (404, 405)
    error_of(client.post("/v1/compression/jobs", json={**BODY, "metadata": {"a": "\0"}}), 400, "invalid_metadata")
    error_of(client.post("/v1/compression/jobs", json={**BODY, "model": "\0"}), 404, "model_not_found")
    for source in ({"source": "hub", "dataset": "a\0"}, {"source": "file", "path": "/a\0"}):
        answer = client.post("/v1/compression/jobs", json={**BODY, "recipe": {**BODY["recipe"], "evaluation": source}})
        assert answer.status_code == 400, answer.text
    builtin = {"text_field": "a\0b"}
    answer = client.post("/v1/compression/jobs", json={**BODY, "recipe": {**BODY["recipe"], "evaluation": builtin}})
    assert answer.status_code in (202, 400, 422), answer.text
