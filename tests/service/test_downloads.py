"""Model files over HTTP: listed, downloaded whole or in ranges, taken up again, and never from outside the folder."""

import hashlib
import shutil
import socket
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api
from tests.tiny_models import make_tiny_model

MIB = 1024**2
WEIGHTS = "/v1/models/tiny/files/model.safetensors/content"


@pytest.fixture(scope="module")
def weights(tiny_folder: Path) -> bytes:
    return (tiny_folder / "model.safetensors").read_bytes()


def test_the_list_has_every_file(client: httpx.Client, tiny_folder: Path) -> None:
    page = client.get("/v1/models/tiny/files").json()
    assert (page["object"], page["has_more"]) == ("list", False)
    assert {file["path"]: file["bytes"] for file in page["data"]} == {
        file.name: file.stat().st_size for file in tiny_folder.iterdir()
    }
    assert {(file["object"], file["sha256"], file["belongs_to"]) for file in page["data"]} == {
        ("model.file", None, "checkpoint")
    }
    first = client.get("/v1/models/tiny/files?limit=1&digests=all").json()
    assert (first["has_more"], first["data"][0]["path"]) == (True, first["last_id"])
    data = (tiny_folder / first["last_id"]).read_bytes()
    assert first["data"][0]["sha256"] == hashlib.sha256(data).hexdigest()
    second = client.get("/v1/models/tiny/files", params={"after": first["last_id"]}).json()
    assert [file["path"] for file in second["data"]] == [file["path"] for file in page["data"]][1:]


def test_a_whole_file(client: httpx.Client, weights: bytes) -> None:
    answer = client.get(WEIGHTS)
    assert (answer.status_code, answer.content) == (200, weights)
    assert answer.headers["content-length"] == str(len(weights))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["accept-ranges"] == "bytes"
    assert "model.safetensors" in answer.headers["content-disposition"]
    head = client.head(WEIGHTS)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "accept-ranges"):
        assert head.headers[name] == answer.headers[name]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-", 0, None),
        ("bytes=10-19", 10, 20),
        ("bytes=1000-", 1000, None),
        ("bytes=-7", -7, None),
        ("bytes=0-0", 0, 1),
        ("bytes=5-99999999999", 5, None),
        ("bytes=-99999999999", 0, None),
    ],
)
def test_ranges(client: httpx.Client, weights: bytes, asked: str, start: int, stop: int | None) -> None:
    answer = client.get(WEIGHTS, headers={"range": asked})
    expected = weights[start:stop]
    first = start if start >= 0 else len(weights) + start
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(weights)}"
    assert answer.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "lines=1-2", "bytes=", "bytes=a-b", "nonsense", "bytes=--1"])
def test_ranges_it_does_not_know_bring_the_whole_file(client: httpx.Client, weights: bytes, asked: str) -> None:
    answer = client.get(WEIGHTS, headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, weights)


def test_a_range_beyond_the_end(client: httpx.Client, weights: bytes) -> None:
    for asked in (f"bytes={len(weights)}-", "bytes=-0", "bytes=9-3"):
        answer = client.get(WEIGHTS, headers={"range": asked})
        assert error_of(answer, 416, "range_not_satisfiable")["param"] == "Range"
        assert answer.headers["content-range"] == f"bytes */{len(weights)}"


def test_the_tag_guards_what_is_gone_on_with(client: httpx.Client, weights: bytes) -> None:
    tag = client.head(WEIGHTS).headers["etag"]
    same = client.get(WEIGHTS, headers={"range": "bytes=100-", "if-range": tag})
    assert (same.status_code, same.content) == (206, weights[100:])
    other = client.get(WEIGHTS, headers={"range": "bytes=100-", "if-range": '"another"'})
    assert (other.status_code, other.content) == (200, weights)
    for known in (tag, f'"x", {tag}', f"W/{tag}", "*"):
        unchanged = client.get(WEIGHTS, headers={"if-none-match": known})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", tag)
    assert client.get(WEIGHTS, headers={"if-none-match": '"x"'}).status_code == 200


def test_the_tag_of_an_uploaded_file_is_its_digest(client: httpx.Client, tiny_folder: Path) -> None:
    files = []
    for file in tiny_folder.iterdir():
        sent = client.post("/v1/files", files={"file": ("f", file.read_bytes())}, data={"purpose": "model"})
        files.append({"file_id": sent.json()["id"], "path": file.name})
    assert client.post("/v1/models", json={"name": "sent", "files": files}).status_code == 201
    for file in client.get("/v1/models/sent/files").json()["data"]:
        answer = client.get(f"/v1/models/sent/files/{file['path']}/content")
        assert file["sha256"] == hashlib.sha256(answer.content).hexdigest()
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
    client.delete("/v1/models/sent")
    error_of(client.get("/v1/models/sent/files"), 404, "model_not_found")
    error_of(client.get("/v1/models/sent/files/config.json/content"), 404, "model_not_found")


def test_files_in_folders_and_empty_ones(client: httpx.Client, tiny_folder: Path) -> None:
    folder = shutil.copytree(tiny_folder, tiny_folder.parent / "nested")
    (folder / "exports").mkdir()
    (folder / "exports" / "größe.txt").write_text("groß")
    (folder / "empty.txt").touch()
    client.post("/v1/models", json={"name": "nested", "path": str(folder)})
    paths = [file["path"] for file in client.get("/v1/models/nested/files").json()["data"]]
    assert {"exports/größe.txt", "empty.txt"} < set(paths)
    for written in ("exports/größe.txt", "exports%2Fgr%C3%B6%C3%9Fe.txt"):
        assert client.get(f"/v1/models/nested/files/{written}/content").content == "groß".encode()
    empty = client.get("/v1/models/nested/files/empty.txt/content")
    assert (empty.status_code, empty.content, empty.headers["content-length"]) == (200, b"", "0")
    error_of(
        client.get("/v1/models/nested/files/empty.txt/content", headers={"range": "bytes=0-"}),
        416,
        "range_not_satisfiable",
    )


def raw(api: RunningApi, target: str) -> tuple[int, bytes]:
    """Send a request line as it is: clients tidy `..` away before anybody sees it."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        lines = (f"GET {target} HTTP/1.1", f"host: {host}", f"authorization: Bearer {api.key}", "connection: close")
        plain.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = b"".join(iter(lambda: plain.recv(65536), b""))
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "%2e%2e%2fsecret.txt",
        "x/../../secret.txt",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "..%5csecret.txt",
        "config.json%00",
        "a%01",
    ],
)
def test_nothing_outside_the_folder_is_reached(api: RunningApi, tiny_folder: Path, path: str) -> None:
    (tiny_folder.parent / "secret.txt").write_text("the secret")
    status, body = raw(api, f"/v1/models/tiny/files/{path}/content")
    assert status == 400, body
    assert b'"unsafe_path"' in body
    assert b"the secret" not in body


def test_a_link_is_refused_by_name(client: httpx.Client, tiny_folder: Path) -> None:
    folder = shutil.copytree(tiny_folder, tiny_folder.parent / "with-link")
    client.post("/v1/models", json={"name": "with-link", "path": str(folder)})
    (folder / "late.txt").symlink_to("/etc/hostname")
    error_of(client.get("/v1/models/with-link/files/late.txt/content"), 400, "symlink_refused")
    error_of(client.get("/v1/models/with-link/files/none.txt/content"), 404, "model_file_not_found")
    error_of(client.get("/v1/models/nobody/files/config.json/content"), 404, "model_not_found")
    listed = [file["path"] for file in client.get("/v1/models/with-link/files").json()["data"]]
    assert "late.txt" not in listed


def test_both_routes_want_a_key(api: RunningApi) -> None:
    for route in ("/v1/models/tiny/files", WEIGHTS):
        error_of(httpx.get(api.url + route, trust_env=False), 401, "missing_api_key")


def test_memory_stays_constant_and_a_caller_who_leaves_frees_everything(tmp_path: Path) -> None:
    """A file of 400 MiB: the server may grow by a small part of it, and holds no file open afterwards."""
    folder = make_tiny_model(tmp_path / "models" / "large")
    with (folder / "large.txt").open("wb") as file:
        file.truncate(400 * MIB)
    with running_api(tmp_path / "home", model_roots=str(tmp_path / "models")) as api, api.client() as client:
        client.post("/v1/models", json={"name": "large", "path": str(folder)})
        process = psutil.Process(api.pid)
        client.get("/v1/models/large/files/config.json/content")
        before, peak, received = process.memory_info().rss, 0, 0
        route = "/v1/models/large/files/large.txt/content"
        with client.stream("GET", route) as answer:
            for number, piece in enumerate(answer.iter_raw()):
                received += len(piece)
                if number % 100 == 0:
                    peak = max(peak, process.memory_info().rss)
        assert received == 400 * MIB
        assert peak - before < 24 * MIB, f"grew by {(peak - before) / MIB:.0f} MiB"
        for _ in range(3):
            with client.stream("GET", route) as answer:
                next(answer.iter_raw())
        assert client.get("/v1/models/large/files?digests=all").status_code == 200
        assert process.memory_info().rss - before < 24 * MIB
        assert [file.path for file in process.open_files() if file.path.endswith("large.txt")] == []
