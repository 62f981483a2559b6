"""Hostile requests to the running API: each is answered by name, the server stays small, and goes on answering."""

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api

MORE_MEMORY = 768 * 1024**2
MORE_RSS = 200 * 1024**2
JSON = {"content-type": "application/json"}
STEP = {"method": "modegpt", "sparsity": 0.2}
SSRF = (
    "https://127.0.0.1/", "https://localhost/", "https://[::1]/", "https://0.0.0.0/", "https://169.254.169.254/latest",
    "https://10.1.2.3/", "https://192.168.0.1/", "https://172.16.0.1/", "https://[fd00::1]/", "https://[fe80::1]/",
    "https://[::ffff:10.0.0.1]/", "https://[64:ff9b::a00:1]/", "https://[2002:a00:1::]/", "https://2130706433/",
    "https://0x7f.1/", "https://0177.0.0.1/", "https://127.1/", "https://100.64.0.1/", "https://224.0.0.1/",
)  # fmt: skip
BAD_URLS = (
    "http://example.com/", "file:///etc/passwd", "gopher://127.0.0.1:6379/_SET", "https://a@b/", "https://a:b@127.0.0.1/",
    "https://a\r\nHost: b/", "https://a/\u0000", "//127.0.0.1/", "https://[::1", "https://a:99999/", "javascript:alert(1)",
)  # fmt: skip


def _job(**recipe: Any) -> dict[str, Any]:
    return {"model": "tiny", "recipe": {"steps": [STEP], **recipe}}


def _multipart(head: bytes, body: bytes = b"x") -> dict[str, Any]:
    content = b"--b\r\n" + head + b"\r\n\r\n" + body + b"\r\n--b--\r\n"
    return {"content": content, "headers": {"content-type": "multipart/form-data; boundary=b"}}


def _file(name: str) -> dict[str, Any]:
    head = f'content-disposition: form-data; name="purpose"\r\n\r\nmodel\r\n--b\r\ncontent-disposition: form-data; name="file"; filename="{name}"'
    return _multipart(head.encode())


REQUESTS: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "json a hundred thousand deep": (
        "POST", "models", {"content": b"[" * 100_000, "headers": JSON}, 400, "invalid_json"),
    "objects a hundred thousand deep": (
        "POST", "models", {"content": b'{"a":' * 50_000, "headers": JSON}, 400, "invalid_json"),
    "a number of a million digits": (
        "POST", "uploads", {"content": b'{"bytes":' + b"9" * 300_000 + b"}", "headers": JSON}, 0,
        "invalid_json"),
    "a body larger than is taken": (
        "POST", "models", {"content": b'"' + b"x" * 9_000_000 + b'"', "headers": JSON}, 413, "body_too_large"),
    "fifty thousand keys": (
        "POST", "models", {"json": {str(number): 1 for number in range(50_000)}}, 422, "unknown_field missing_field"),
    "a recipe of ten thousand steps": ("POST", "compression/jobs", {"json": _job(steps=[STEP] * 10_000)}, 422, "invalid_value"),
    "json that is called text": ("POST", "uploads", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 422, "invalid_value"),
    "a name that climbs": ("POST", "models", {"json": {"name": "../../x", "path": "/x"}}, 422, "invalid_value"),
    "a name written backwards": ("POST", "models", {"json": {"name": "\u202egnp.x", "path": "/x"}}, 422, "invalid_value"),
    "a name of combining marks": ("POST", "models", {"json": {"name": "a" + "\u0301" * 5000, "path": "/x"}}, 422, "invalid_value"),
    "a path outside the roots": ("POST", "models", {"json": {"name": "x", "path": "/etc"}}, 403, "path_not_allowed"),
    "a path that climbs out of the roots": ("POST", "models", {"json": {"name": "x", "path": "{root}/../../etc"}}, 403, "path_not_allowed"),
    "a link out of the roots": ("POST", "models", {"json": {"name": "x", "path": "{root}/out"}}, 403, "path_not_allowed"),
    "a path with a NUL": ("POST", "models", {"json": {"name": "x", "path": "/a\0b"}}, 0, "unsafe_path"),
    "files that climb": (
        "POST", "models", {"json": {"name": "x", "files": [{"file_id": "file-0", "path": "../../x"}]}}, 0, "unsafe_path invalid_value"),
    "files one inside the other": (
        "POST", "models",
        {"json": {"name": "x", "files": [{"file_id": "f", "path": "a"}, {"file_id": "f", "path": "a/b"}]}}, 0,
        "unsafe_path duplicate_path invalid_value file_not_found"),
    "a hub id that climbs": ("POST", "models", {"json": {"name": "x", "hub_id": "../../etc"}}, 422, "invalid_value"),
    "text from a secret": (
        "POST", "compression/jobs", {"json": _job(calibration={"source": "file", "path": "/etc/shadow"})}, 0, "path_not_allowed"),
    "a file of the model that climbs": ("GET", "models/tiny/files/..%2F..%2Fetc%2Fpasswd/content", {}, 0, "unsafe_path"),
    "a file of the model with a NUL": ("GET", "models/tiny/files/a%00b/content", {}, 0, "unsafe_path"),
    "a hidden file of the model": ("GET", "models/tiny/files/.git%2Fconfig/content", {}, 0, "model_file_not_found unsafe_path"),
    "a range of 10**40 bytes": (
        "GET", "models/tiny/files/config.json/content", {"headers": {"range": "bytes=" + "9" * 18 + "-"}}, 416, "range_not_satisfiable"),
    "a filter that makes a pattern run": (
        "GET", "compression/jobs?metadata[" + "a" * 5000 + "!", {}, 400, "invalid_value"),
    "a hundred filters": (
        "GET", "compression/jobs?" + "&".join(f"metadata[k{number}]=v" for number in range(100)), {}, 400, "invalid_value"),
    "a cursor of SQL": ("GET", "models?after=x'%20OR%201=1--", {}, 404, "model_not_found"),
    "a cursor with a NUL": ("GET", "files?after=%00", {}, 404, "file_not_found"),
    "metadata with a NUL": ("POST", "compression/jobs", {"json": {**_job(), "metadata": {"a": "\0"}}}, 400, "invalid_metadata"),
    "a digest that makes a pattern run": ("GET", "files/sha256/" + "a" * 5000, {}, 422, "invalid_value"),
    "a form without a boundary": (
        "POST", "files", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "invalid_multipart"),
    "a form with a header of a megabyte": ("POST", "files", _multipart(b"x: " + b"y" * 1_000_000), 400, "invalid_multipart"),
    "a form whose field is a megabyte": (
        "POST", "files", _multipart(b'content-disposition: form-data; name="purpose"', b"x" * 1_000_000), 400, "invalid_value"),
    "a form with two files": (
        "POST", "files", {"files": [("file", ("a", b"x")), ("file", ("b", b"y"))], "data": {"purpose": "model"}}, 400, "duplicate_field"),
    "a form that never ends": (
        "POST", "files", {"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "invalid_multipart"),
    "a filename with a line break": ("POST", "files", _file("a%0D%0Ab\x01"), 400, "invalid_value"),
    "an upload of a terabyte": ("POST", "uploads", {"json": {"filename": "x", "purpose": "model", "bytes": 10**12}}, 413, "upload_too_large"),
    "an upload below nothing": ("POST", "uploads", {"json": {"filename": "x", "purpose": "model", "bytes": -1}}, 422, "invalid_value"),
    "a key with another alphabet": ("GET", "models", {"headers": {"authorization": "Bearer mp_\u00e9".encode("latin-1")}}, 401, "invalid_api_key"),
    "a key of a hundred kilobytes": ("GET", "models", {"headers": {"authorization": "Bearer " + "x" * 30_000}}, 401, "invalid_api_key"),
    **{f"webhook to {url}": ("POST", "webhooks", {"json": {"url": url}}, 400, "webhook_address_not_allowed") for url in SSRF},
    **{f"webhook to {url!r}": ("POST", "webhooks", {"json": {"url": url}}, 400, "invalid_webhook_url") for url in BAD_URLS},
}  # fmt: skip


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory, redis_url: str, tiny_folder: Path) -> Iterator[RunningApi]:
    home = tmp_path_factory.mktemp("besieged")
    (tiny_folder.parent / "out").symlink_to("/etc")
    roots = str(tiny_folder.parent)
    with running_api(home, broker_url=redis_url, model_roots=roots, inference_url="http://127.0.0.1:1") as api:
        with api.client() as client:
            client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)})
            client.get("/v1/models")
        mapped = psutil.Process(api.pid).memory_info().vms
        psutil.Process(api.pid).rlimit(resource.RLIMIT_AS, (mapped + MORE_MEMORY, mapped + MORE_MEMORY))
        yield api
    (tiny_folder.parent / "out").unlink()


def _with_root(value: Any, root: str) -> Any:
    return json.loads(json.dumps(value).replace("{root}", root)) if "json" in value else value


@pytest.mark.parametrize("name", REQUESTS)
def test_it_is_refused_by_name(besieged: RunningApi, tiny_folder: Path, name: str) -> None:
    method, path, sent, status, codes = REQUESTS[name]
    before = psutil.Process(besieged.pid).memory_info().rss
    with besieged.client() as client:
        answer = client.request(method, f"/v1/{path}", **_with_root(sent, str(tiny_folder.parent)))
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.status_code == (status or answer.status_code)
        code = answer.json()["error"]["code"]
        assert code in codes.split(), answer.text[:500]
        assert len(error_of(answer, answer.status_code, code)["message"]) < 1000
        assert client.get("/v1/models").status_code == 200
    assert psutil.Process(besieged.pid).memory_info().rss < before + MORE_RSS
    assert list(besieged.home.glob("tmp/*")) == []
    assert list(besieged.home.glob("blobs/??/*")) == []


def test_headers_without_end_are_cut_off(besieged: RunningApi) -> None:
    url = httpx.URL(besieged.url)
    with socket.create_connection((url.host, url.port), timeout=20) as line:
        line.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n")
        with suppress(ConnectionError):  # it may hang up while we still talk
            for _ in range(20):
                line.sendall(b"x: " + b"y" * 65_000 + b"\r\n")
        with suppress(ConnectionError):
            assert line.recv(4096)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert httpx.get(f"{besieged.url}/healthz", trust_env=False).status_code == 200
