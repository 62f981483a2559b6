"""Every route, with every scope, for its own owner, for another one and for an admin: what each is answered."""

import hashlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi.routing import APIRoute

from api_schemas.keys import Scope
from api_schemas.webhooks import WebhookRequest
from job_store.database import make_engine
from job_store.keys import KeyStore
from job_store.outbound import system_resolver
from job_store.owners import Viewer
from job_store.webhooks import WebhookStore
from service.app import ROUTERS
from service.permissions import PERMITTED, Permissions
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi

RECIPE = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}
TURN = {"model": "{model}", "messages": [{"role": "user", "content": "hi"}]}
UPLOAD = {"filename": "x", "purpose": "model", "bytes": 1}
JOB = {"model": "{model}", "recipe": RECIPE}
HOOK = {"url": "https://127.0.0.1/hook"}
WRITE, LOOK, TALK = ("submit",), ("read", "submit"), ("infer",)
NAMES = ("read", "submit", "infer")


@dataclass(frozen=True)
class Row:
    """What a route answers: to scopes that may, and to those of another owner, as status and (for errors) code."""

    may: tuple[str, ...]
    own: tuple[int, str]
    other: tuple[int, str]
    json: Any = None
    files: Any = None
    params: dict[str, str] = field(default_factory=dict)


GONE_FILE, GONE_MODEL, GONE_JOB = (404, "file_not_found"), (404, "model_not_found"), (404, "job_not_found")
GONE_HOOK = (404, "webhook_not_found")
GONE_UPLOAD, OK, EMPTY = (404, "upload_not_found"), (200, ""), (200, "empty")
CONTENT = "/v1/models/{model_id}/files/{path:path}/content"
NO_INFERENCE = (503, "inference_unavailable")
ROWS = {
    ("POST", "/v1/uploads"): Row(WRITE, OK, OK, UPLOAD),
    ("GET", "/v1/uploads/{upload_id}"): Row(LOOK, OK, GONE_UPLOAD),
    ("POST", "/v1/uploads/{upload_id}/parts"): Row(WRITE, OK, GONE_UPLOAD, files={"data": b"x"}),
    ("GET", "/v1/uploads/{upload_id}/parts"): Row(LOOK, OK, GONE_UPLOAD),
    ("POST", "/v1/uploads/{upload_id}/complete"): Row(WRITE, OK, GONE_UPLOAD, {"part_ids": ["{part}"]}),
    ("POST", "/v1/uploads/{upload_id}/cancel"): Row(WRITE, OK, GONE_UPLOAD),
    ("POST", "/v1/files"): Row(WRITE, OK, OK, files={"file": ("a", b"x"), "purpose": (None, "model")}),
    ("GET", "/v1/files"): Row(LOOK, OK, EMPTY),
    ("HEAD", "/v1/files/sha256/{digest}"): Row(LOOK, OK, (404, "")),
    ("GET", "/v1/files/sha256/{digest}"): Row(LOOK, OK, GONE_FILE),
    ("GET", "/v1/files/{file_id}"): Row(LOOK, OK, GONE_FILE),
    ("GET", "/v1/files/{file_id}/content"): Row(LOOK, OK, GONE_FILE),
    ("DELETE", "/v1/files/{file_id}"): Row(WRITE, OK, GONE_FILE),
    ("POST", "/v1/models"): Row(WRITE, (201, ""), (201, ""), {"name": "{fresh}", "path": "{folder}"}),
    ("GET", "/v1/models"): Row(NAMES, OK, EMPTY),
    ("GET", "/v1/models/{model_id}"): Row(NAMES, OK, GONE_MODEL),
    ("DELETE", "/v1/models/{model_id}"): Row(WRITE, (409, "model_in_use"), GONE_MODEL),
    ("GET", "/v1/models/{model_id}/files"): Row(LOOK, OK, GONE_MODEL),
    ("HEAD", CONTENT): Row(LOOK, OK, (404, "")),
    ("GET", CONTENT): Row(LOOK, OK, GONE_MODEL),
    ("POST", "/v1/compression/plans"): Row(LOOK, OK, GONE_MODEL, JOB),
    ("POST", "/v1/compression/jobs"): Row(WRITE, (202, ""), GONE_MODEL, JOB),
    ("GET", "/v1/compression/jobs"): Row(LOOK, OK, EMPTY),
    ("GET", "/v1/compression/jobs/{job_id}"): Row(LOOK, OK, GONE_JOB),
    ("POST", "/v1/compression/jobs/{job_id}/cancel"): Row(WRITE, OK, GONE_JOB),
    ("GET", "/v1/compression/jobs/{job_id}/events"): Row(LOOK, OK, GONE_JOB),
    ("GET", "/v1/compression/jobs/{job_id}/report"): Row(LOOK, (404, "report_not_ready"), GONE_JOB),
    ("GET", "/v1/workers"): Row(LOOK, OK, OK),
    ("GET", "/v1/compression/jobs/{job_id}/trace"): Row(LOOK, (404, "trace_not_ready"), GONE_JOB),
    ("GET", "/v1/quota"): Row(NAMES, OK, OK),
    ("GET", "/v1/audit"): Row((), OK, OK),
    ("POST", "/v1/webhooks"): Row(
        WRITE, (400, "webhook_address_not_allowed"), (400, "webhook_address_not_allowed"), HOOK
    ),
    ("GET", "/v1/webhooks"): Row(LOOK, OK, EMPTY),
    ("GET", "/v1/webhooks/{webhook_id}"): Row(LOOK, OK, GONE_HOOK),
    ("DELETE", "/v1/webhooks/{webhook_id}"): Row(WRITE, OK, GONE_HOOK),
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): Row(LOOK, OK, GONE_HOOK),
    ("POST", "/v1/chat/completions"): Row(TALK, NO_INFERENCE, GONE_MODEL, TURN),
    ("POST", "/v1/completions"): Row(TALK, NO_INFERENCE, GONE_MODEL, {"model": "{model}", "prompt": "x"}),
}
ROUTES = sorted(
    (method, route.path)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods
)


class Cast:
    """Two owners with a key per scope each, and what the first of them has."""

    def __init__(self, api: RunningApi, folder: Path, client: httpx.Client) -> None:
        self.folder, self.client = folder, client
        self.keys: dict[tuple[str, str], str] = {}
        engine = make_engine(api.settings().resolved_database_url)
        store = KeyStore(engine)
        for owner in ("anna", "bert"):
            for scope in get_args(Scope):
                self.keys[owner, scope] = store.create(scope, scopes=(scope,), owner=owner).secret
        # Straight into the database: the server itself takes no address of this machine.
        self.hooks = WebhookStore(engine, frozenset({"127.0.0.1:1"}), system_resolver, viewer=Viewer("anna"))

    def ask(self, who: tuple[str, str], method: str, path: str, **sent: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[who]}", **sent.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **sent)

    def things(self) -> dict[str, str]:
        """One of each kind, made by anna: a file nobody else has, a model of the tiny folder, a job, an upload."""
        anna = ("anna", "submit")
        data = secrets.token_bytes(20)
        file = self.ask(anna, "POST", "/v1/files", files={"file": ("a", data)}, data={"purpose": "model"})
        model = f"m-{secrets.token_hex(6)}"
        made = self.ask(anna, "POST", "/v1/models", json={"name": model, "path": str(self.folder)})
        assert made.status_code == 201, made.text
        job = self.ask(anna, "POST", "/v1/compression/jobs", json={"model": model, "recipe": RECIPE})
        upload = self.ask(anna, "POST", "/v1/uploads", json=UPLOAD).json()["id"]
        for old in self.hooks.list().data[:-5]:  # an owner has only so many
            self.hooks.delete(old.id)
        hook = self.hooks.create(WebhookRequest(url="http://127.0.0.1:1/hook")).id
        part = self.ask(anna, "POST", f"/v1/uploads/{upload}/parts", files={"data": b"x"})
        return {
            "upload_id": upload, "part": part.json()["id"], "file_id": file.json()["id"],
            "digest": hashlib.sha256(data).hexdigest(), "model_id": model, "model": model, "path": "config.json",
            "job_id": job.json()["id"], "webhook_id": hook, "folder": str(self.folder),
        }  # fmt: skip


@pytest.fixture(scope="module")
def cast(api: RunningApi, tiny_folder: Path) -> Iterator[Cast]:
    with httpx.Client(base_url=api.url, trust_env=False, timeout=60) as client:
        yield Cast(api, tiny_folder, client)


def test_every_route_has_its_row() -> None:
    assert sorted(ROWS) == ROUTES == sorted(PERMITTED)


def test_a_route_nobody_thought_of_stops_the_application() -> None:
    from fastapi import APIRouter

    router = APIRouter(prefix="/v1/secrets")
    router.add_api_route("", lambda: None, methods=["GET"])
    with pytest.raises(LookupError, match="secrets"):
        Permissions([router])


def _filled(value: Any, things: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, things) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, things) for inner in value]
    if isinstance(value, str):
        fresh = {**things, "fresh": f"f-{secrets.token_hex(6)}"}
        return re.sub(r"\{(\w+)(?::path)?\}", lambda found: fresh[found[1]], value)
    return value


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_who_may_do_what(cast: Cast, route: tuple[str, str]) -> None:
    method, path = route
    row = ROWS[route]
    things = cast.things()
    for owner in ("bert", "anna"):
        for scope in get_args(Scope):
            body = _filled(row.json, things)
            answer = cast.ask((owner, scope), method, _filled(path, things), json=body, files=row.files)
            if scope == "admin":
                expected = row.own  # of whomever it is
            elif scope not in row.may:
                expected = (403, "missing_scope" if method != "HEAD" else "")
            else:
                expected = row.own if owner == "anna" else row.other
            _check(answer, expected, f"{owner}'s {scope} key on {method} {path}")
            if answer.status_code == 200 and (method == "DELETE" or path.endswith(("cancel", "complete"))):
                things = cast.things()  # the next one needs one that is still there


def _check(answer: httpx.Response, expected: tuple[int, str], what: str) -> None:
    status, code = expected
    assert answer.status_code == status, f"{what}: {answer.text}"
    if code == "empty":
        assert answer.json()["data"] == [], what
    elif code:
        error = error_of(answer, status, code)
        if code == "missing_scope":
            assert (error["type"], error["param"]) == ("permission_error", "Authorization")
            assert "modepress keys create" in error["message"]


def test_a_scope_is_asked_for_before_the_body_is_read(cast: Cast) -> None:
    answer = cast.ask(("anna", "read"), "POST", "/v1/compression/jobs", content=b"{")
    error_of(answer, 403, "missing_scope")


def test_what_others_have_cannot_be_used(cast: Cast) -> None:
    """Neither a file of another owner as text or weights, nor its bytes by their digest, nor its id as a cursor."""
    things, bert = cast.things(), ("bert", "submit")
    text = {**RECIPE, "calibration": {"source": "upload", "file_id": things["file_id"]}}
    own = cast.ask(bert, "POST", "/v1/models", json={"name": f"b-{secrets.token_hex(6)}", "path": things["folder"]})
    answer = cast.ask(bert, "POST", "/v1/compression/jobs", json={"model": own.json()["id"], "recipe": text})
    error_of(answer, 400, "file_not_found")
    files = [{"file_id": things["file_id"], "path": "model.safetensors"}]
    error_of(cast.ask(bert, "POST", "/v1/models", json={"name": "b-stolen", "files": files}), 404, "file_not_found")
    upload = {"filename": "x", "purpose": "model", "bytes": 20, "sha256": things["digest"]}
    opened = cast.ask(bert, "POST", "/v1/uploads", json=upload).json()["id"]
    answer = cast.ask(bert, "POST", f"/v1/uploads/{opened}/complete", json={"part_ids": []})
    error_of(answer, 400, "upload_size_mismatch")
    for kind, cursor in (("files", "file_id"), ("models", "model_id"), ("compression/jobs", "job_id")):
        assert cast.ask(bert, "GET", f"/v1/{kind}", params={"after": things[cursor]}).status_code == 404
    answer = cast.ask(("bert", "read"), "GET", f"/v1/compression/jobs/{things['job_id']}/events?stream=true")
    error_of(answer, 404, "job_not_found")


def test_idempotency_keys_count_per_owner(cast: Cast) -> None:
    jobs = []
    for owner in ("anna", "bert"):
        who = (owner, "submit")
        model = f"i-{secrets.token_hex(6)}"
        cast.ask(who, "POST", "/v1/models", json={"name": model, "path": str(cast.folder)})
        sent = {"json": {"model": model, "recipe": RECIPE}, "headers": {"idempotency-key": "the-same"}}
        first, second = (cast.ask(who, "POST", "/v1/compression/jobs", **sent) for _ in range(2))
        assert (first.status_code, second.status_code) == (202, 200), first.text
        assert first.json()["id"] == second.json()["id"]
        jobs.append(first.json()["id"])
    assert jobs[0] != jobs[1]


def test_who_owns_a_model_is_told(cast: Cast) -> None:
    things = cast.things()
    answer = cast.ask(("bert", "admin"), "GET", f"/v1/models/{things['model_id']}")
    assert answer.json()["owned_by"] == "anna"
