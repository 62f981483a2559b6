"""Uploads over HTTP: the stock client, parts in any order, a killed server, limits, memory."""

import hashlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, free_port, running_api

MIB = 1024**2
DATA = hashlib.shake_256(b"upload").digest(2_500_000)
PIECES = [DATA[start : start + 500_000] for start in range(0, len(DATA), 500_000)]


def begin(client: httpx.Client, size: int, **fields: object) -> str:
    values = {"filename": "model.safetensors", "purpose": "model", "bytes": size, **fields}
    answer = client.post("/v1/uploads", json=values)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def send(client: httpx.Client, upload: str, data: bytes, number: int | None = None) -> httpx.Response:
    fields = {} if number is None else {"number": str(number)}
    return client.post(f"/v1/uploads/{upload}/parts", data=fields, files={"data": ("part", data)})


def complete(client: httpx.Client, upload: str, *part_ids: str, **digests: str) -> httpx.Response:
    return client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": part_ids, **digests})


def test_the_stock_client_uploads_in_chunks(api: RunningApi) -> None:
    with OpenAI(base_url=f"{api.url}/v1", api_key=api.key) as client:
        upload = client.uploads.upload_file_chunked(
            file=DATA,
            filename="model.safetensors",
            bytes=len(DATA),
            mime_type="application/octet-stream",
            purpose="user_data",
            part_size=400_000,
            md5=hashlib.md5(DATA, usedforsecurity=False).hexdigest(),
        )
        assert upload.status == "completed"
        assert upload.file is not None
        assert client.files.content(upload.file.id).read() == DATA
        assert client.files.retrieve(upload.file.id).bytes == len(DATA)
        assert upload.file.id in [file.id for file in client.files.list()]
        assert client.files.delete(upload.file.id).deleted


def test_parts_in_parallel_out_of_order_and_repeated(client: httpx.Client) -> None:
    upload = begin(client, len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    assert send(client, upload, b"wrong", number=2).status_code == 200
    numbers = [4, 2, 0, 3, 1]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: send(client, upload, PIECES[number], number), numbers))
    assert [answer.status_code for answer in answers] == [200] * 5
    listed = client.get(f"/v1/uploads/{upload}/parts").json()["data"]
    assert [part["number"] for part in listed] == [0, 1, 2, 3, 4]
    assert [part["sha256"] for part in listed] == [hashlib.sha256(piece).hexdigest() for piece in PIECES]
    done = complete(client, upload, *(part["id"] for part in listed)).json()
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == DATA
    part_range = client.get(f"/v1/files/{done['file']['id']}/content", headers={"range": "bytes=10-19"})
    assert (part_range.status_code, part_range.content) == (206, DATA[10:20])
    beyond = client.get(f"/v1/files/{done['file']['id']}/content", headers={"range": f"bytes={len(DATA)}-"})
    error_of(beyond, 416, "range_not_satisfiable")
    whole = client.get(f"/v1/files/{done['file']['id']}/content", headers={"range": "nonsense"})
    assert (whole.status_code, whole.content) == (200, DATA)
    assert whole.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'


def test_wrong_size_digest_part_and_state(client: httpx.Client) -> None:
    upload = begin(client, 6)
    part = send(client, upload, b"abc").json()["id"]
    assert error_of(complete(client, upload, part), 400, "upload_size_mismatch")["param"] == "part_ids"
    assert error_of(complete(client, upload, part, "part_none"), 400, "unknown_part")["param"] == "part_ids.1"
    error_of(complete(client, upload, part, part), 400, "duplicate_part")
    more = send(client, upload, b"def").json()["id"]
    assert error_of(complete(client, upload, part, more, sha256="0" * 64), 400, "digest_mismatch")["param"] == "sha256"
    assert error_of(complete(client, upload, part, more, md5="0" * 32), 400, "digest_mismatch")["param"] == "md5"
    assert complete(client, upload, part, more).json()["status"] == "completed"
    assert error_of(client.post(f"/v1/uploads/{upload}/cancel"), 409, "upload_not_pending")["message"]
    error_of(send(client, upload, b"late"), 409, "upload_not_pending")
    for route in ("/v1/uploads/none", "/v1/uploads/none/parts"):
        error_of(client.get(route), 404, "upload_not_found")
    error_of(send(client, "none", b"x"), 404, "upload_not_found")
    error_of(client.get(f"/v1/uploads/{upload}/parts?after=none"), 404, "part_not_found")


def test_cancel(client: httpx.Client) -> None:
    upload = begin(client, 6)
    assert client.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"
    assert client.get(f"/v1/uploads/{upload}").json()["status"] == "cancelled"


def test_limits_are_named_with_their_number(client: httpx.Client) -> None:
    answer = client.post("/v1/uploads", json={"filename": "x", "purpose": "model", "bytes": 200_000_000_001})
    assert "200000000000 bytes" in error_of(answer, 413, "upload_too_large")["message"]
    upload = begin(client, 5_000_000)
    assert "1000000 bytes" in error_of(send(client, upload, bytes(1_000_001)), 413, "part_too_large")["message"]
    error_of(send(client, upload, bytes(4_000_000)), 413, "part_too_large")
    assert client.get(f"/v1/uploads/{upload}/parts").json()["data"] == []
    flood = begin(client, 10)
    for _ in range(2):
        last = send(client, flood, bytes(600_000))
    error_of(last, 400, "upload_size_exceeded")


def test_limits_hold_for_bodies_without_a_length(client: httpx.Client, api: RunningApi) -> None:
    """A chunked body is counted while it streams in; nothing of it stays."""

    def endless() -> Iterator[bytes]:
        yield b'--B\r\ncontent-disposition: form-data; name="data"; filename="x"\r\n\r\n'
        for _ in range(100):
            yield bytes(100_000)

    upload = begin(client, 5_000_000)
    headers = {"content-type": "multipart/form-data; boundary=B"}
    answer = client.post(f"/v1/uploads/{upload}/parts", content=endless(), headers=headers)
    error_of(answer, 413, "part_too_large")
    answer = client.post("/v1/files", content=endless(), headers=headers)
    assert error_of(answer, 400, "unknown_field")["param"] == "data"
    answer = client.post("/v1/uploads", content=endless(), headers={"content-type": "application/json"})
    error_of(answer, 413, "body_too_large")
    assert not list(api.home.glob("tmp/file.*"))
    assert not list(api.home.glob("uploads/*/*.tmp"))


@pytest.mark.parametrize(
    ("content", "content_type", "code"),
    [
        (b"{}", "application/json", "invalid_multipart"),
        (b"", "multipart/form-data", "invalid_multipart"),
        (b"", "multipart/form-data; boundary=B", "invalid_multipart"),
        (b"garbage", "multipart/form-data; boundary=B", "invalid_multipart"),
        (b'--B\r\ncontent-disposition: form-data; name="data"\r\n\r\nhalf', "multipart/form-data; boundary=B", None),
        (b"--B--\r\n", None, "missing_field"),
        (b'--B\r\ncontent-disposition: form-data; name="number"\r\n\r\n1\r\n--B--', None, "missing_field"),
        (b'--B\r\ncontent-disposition: form-data; name="number"\r\n\r\n-1\r\n--B--', None, "missing_field"),
        (b'--B\r\ncontent-disposition: form-data; name="evil"\r\n\r\n1\r\n--B--', None, "unknown_field"),
        (b"--B\r\n" + b"x" * 9000 + b": y\r\n\r\n--B--", None, "invalid_multipart"),
        (
            b'--B\r\ncontent-disposition: form-data; name="number"\r\n\r\n' + b"1" * 2000 + b"\r\n--B--",
            None,
            "invalid_value",
        ),
    ],
)
def test_broken_forms(client: httpx.Client, content: bytes, content_type: str | None, code: str | None) -> None:
    upload = begin(client, 10)
    headers = {"content-type": content_type or "multipart/form-data; boundary=B"}
    answer = client.post(f"/v1/uploads/{upload}/parts", content=content, headers=headers)
    error_of(answer, 400, code or "invalid_multipart")


@pytest.mark.parametrize("number", ["-1", "1.5", "x", "1000001", "99999999999", "", "٣"])
def test_part_numbers_are_whole(client: httpx.Client, number: str) -> None:
    upload = begin(client, 10)
    answer = client.post(f"/v1/uploads/{upload}/parts", data={"number": number}, files={"data": b"x"})
    assert error_of(answer, 400, "invalid_value")["param"] == "number"


def test_a_field_sent_twice(client: httpx.Client) -> None:
    upload = begin(client, 10)
    files = [("data", ("a", b"x")), ("data", ("b", b"y"))]
    error_of(client.post(f"/v1/uploads/{upload}/parts", files=files), 400, "duplicate_field")


def test_small_files_in_one_request(client: httpx.Client) -> None:
    text = "größer".encode()
    file = client.post("/v1/files", files={"file": ("naïve text.txt", text)}, data={"purpose": "calibration"}).json()
    assert (file["bytes"], file["purpose"], file["filename"]) == (len(text), "calibration", "naïve text.txt")
    digest = hashlib.sha256(text).hexdigest()
    found = client.head(f"/v1/files/sha256/{digest}")
    assert (found.status_code, found.headers["x-file-id"]) == (200, file["id"])
    assert client.get(f"/v1/files/sha256/{digest}").json() == file
    assert file in client.get("/v1/files?purpose=calibration").json()["data"]
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert client.head(f"/v1/files/sha256/{digest}").status_code == 404
    error_of(client.get(f"/v1/files/sha256/{digest}"), 404, "file_not_found")
    for answer in (
        client.get(f"/v1/files/{file['id']}"),
        client.get(f"/v1/files/{file['id']}/content"),
        client.delete(f"/v1/files/{file['id']}"),
        client.get("/v1/files?after=none"),
    ):
        error_of(answer, 404, "file_not_found")


def test_small_files_that_are_refused(client: httpx.Client) -> None:
    def post(data: bytes, **purpose: str) -> httpx.Response:
        return client.post("/v1/files", files={"file": ("f", data)}, data=purpose)

    assert error_of(post(b"x"), 400, "missing_field")["param"] == "purpose"
    assert "calibration" in error_of(post(b"x", purpose="assistants"), 400, "invalid_value")["message"]
    assert "2000000 bytes" in error_of(post(bytes(2_000_001), purpose="model"), 413, "file_too_large")["message"]
    nameless = b'--B\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--B--'
    headers = {"content-type": "multipart/form-data; boundary=B"}
    with_purpose = nameless.removesuffix(b"--B--")
    with_purpose += b'--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nmodel\r\n--B--'
    assert error_of(client.post("/v1/files", content=with_purpose, headers=headers), 400, "invalid_value")["param"]
    error_of(client.get(f"/v1/files/sha256/{'A' * 64}"), 422, "invalid_value")


def test_an_upload_survives_a_killed_server(tmp_path: Path) -> None:
    """Parts that were acknowledged are there after kill -9; the client sends the rest and completes."""
    home, port = tmp_path / "home", free_port()
    with running_api(home, port=port) as api, api.client() as client:
        upload = begin(client, len(DATA))
        for number in (0, 3):
            assert send(client, upload, PIECES[number], number).status_code == 200
        os.kill(api.pid, signal.SIGKILL)
    with running_api(home) as api, api.client() as client:
        arrived = {part["number"]: part["id"] for part in client.get(f"/v1/uploads/{upload}/parts").json()["data"]}
        assert sorted(arrived) == [0, 3]
        for number in (1, 2, 4):
            arrived[number] = send(client, upload, PIECES[number], number).json()["id"]
        done = complete(client, upload, *(arrived[number] for number in range(5))).json()
        assert client.get(f"/v1/files/{done['file']['id']}/content").content == DATA


def test_memory_stays_constant(tmp_path: Path) -> None:
    """300 MiB in parts of 64 MiB: the server may grow by far less than one part."""
    part = bytes(60 * MIB)
    with running_api(tmp_path / "home") as api, api.client() as client:
        process = psutil.Process(api.pid)
        small = begin(client, 3)
        complete(client, small, send(client, small, b"abc").json()["id"])
        before = process.memory_info().rss
        upload, peak, ids = begin(client, 5 * len(part)), 0, []
        for _ in range(5):
            ids.append(send(client, upload, part).json()["id"])
            peak = max(peak, process.memory_info().rss)
        done = complete(client, upload, *ids, sha256=hashlib.sha256(part * 5).hexdigest()).json()
        peak = max(peak, process.memory_info().rss)
        assert done["file"]["bytes"] == 5 * len(part)
        assert peak - before < 24 * MIB, f"grew by {(peak - before) / MIB:.0f} MiB"
