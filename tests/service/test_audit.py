"""The audit log: who did what when, refusals too; and a webhook through the whole API."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from job_store.database import make_engine
from job_store.keys import KeyStore
from tests.job_store.test_webhooks import Receiver, receiving
from tests.servers import wait_until
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api

RECIPE = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


@pytest.fixture(scope="module")
def audited(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, tiny_folder: Path, receiver: Receiver
) -> Iterator[RunningApi]:
    home = tmp_path_factory.mktemp("audited")
    hosts = {"model_roots": str(tiny_folder.parent), "webhook_private_hosts": f"127.0.0.1:{receiver.port}"}
    with running_api(home, broker_url=redis_url, **hosts) as api:
        yield api


def test_what_was_done_is_written_down(audited: RunningApi, tiny_folder: Path) -> None:
    engine = make_engine(audited.settings().resolved_database_url)
    reader = KeyStore(engine).create("r", scopes=("read",), owner="anna")
    engine.dispose()
    name = f"m-{secrets.token_hex(4)}"
    with audited.client() as client:
        client.get("/v1/models")
        client.post("/v1/models", json={"name": name, "path": str(tiny_folder)}, headers={"x-request-id": "one"})
        upload = client.post("/v1/uploads", json={"filename": "x", "purpose": "model", "bytes": 1}).json()["id"]
        client.post(f"/v1/uploads/{upload}/parts", files={"data": b"x"})
        refused = {"authorization": f"Bearer {reader.secret}"}
        error_of(client.delete(f"/v1/models/{name}", headers=refused), 403, "missing_scope")
        client.delete(f"/v1/models/{name}")
        httpx.post(f"{audited.url}/v1/uploads", trust_env=False)  # of somebody unknown: not written down
        found = client.get("/v1/audit").json()["data"]
        told = [(line["action"], line["target"], line["status"], line["owner"]) for line in found]
        assert told[:4] == [
            ("DELETE /v1/models/{model_id}", name, 200, "default"),
            (f"DELETE /v1/models/{name}", None, 403, "anna"),
            ("POST /v1/uploads", upload, 200, "default"),
            ("POST /v1/models", name, 201, "default"),
        ]
        assert found[3]["request_id"] == "one"
        assert found[1]["actor"] == reader.id
        assert found[0]["address"] == "127.0.0.1"
        page = client.get("/v1/audit", params={"limit": 1, "after": found[0]["id"]}).json()
        assert (page["data"], page["has_more"]) == ([found[1]], True)
        assert [line["owner"] for line in client.get("/v1/audit?owner=anna").json()["data"]] == ["anna"]
        error_of(client.get("/v1/audit?after=x"), 400, "invalid_value")
        error_of(client.get("/v1/audit", headers=refused), 403, "missing_scope")


def test_a_webhook_is_told_by_the_running_api(audited: RunningApi, receiver: Receiver, tiny_folder: Path) -> None:
    with audited.client() as client:
        made = client.post("/v1/webhooks", json={"url": receiver.url})
        assert made.status_code == 201
        hook = made.json()
        assert made.headers["location"] == f"/v1/webhooks/{hook['id']}"
        assert "secret" not in client.get(f"/v1/webhooks/{hook['id']}").json()
        client.post("/v1/models", json={"name": "hooked", "path": str(tiny_folder)})
        job = client.post("/v1/compression/jobs", json={"model": "hooked", "recipe": RECIPE}).json()["id"]
        client.post(f"/v1/compression/jobs/{job}/cancel")
        wait_until(lambda: receiver.received, what="the webhook")
        assert json.loads(receiver.received[0][1])["data"]["id"] == job
        path = f"/v1/webhooks/{hook['id']}/deliveries"
        wait_until(lambda: client.get(path).json()["data"][0]["status"] == "delivered", what="its state")
        error_of(client.post("/v1/webhooks", json={"url": "https://127.0.0.1/x"}), 400, "webhook_address_not_allowed")
        error_of(client.post("/v1/webhooks", json={"url": "x", "secret": "y"}), 422, "unknown_field")
        assert client.delete(f"/v1/webhooks/{hook['id']}").json()["deleted"] is True
