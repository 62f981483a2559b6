"""Sending one file: skipped when the server has it, in parts side by side, resumed where an earlier try stopped."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from api_schemas.files import CompleteRequest, FileObject, Purpose, Upload, UploadPart, UploadRequest
from api_schemas.listing import Page
from modepress.api_error import ModepressApiError, raise_for
from modepress.connection import Connection

PARALLEL_PARTS = 4

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Journal:
    """Remembers unfinished uploads between two runs of the client: one small file each, removed at completion."""

    folder: Path

    def find(self, server: str, sha256: str) -> str | None:
        """Return the id of the upload begun earlier, if any."""
        path = self._path(server, sha256)
        return str(json.loads(path.read_text())["upload_id"]) if path.is_file() else None

    def note(self, server: str, sha256: str, upload_id: str) -> None:
        """Remember an upload that begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{sha256}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({"server": server, "upload_id": upload_id}))
        temporary.replace(self._path(server, sha256))

    def forget(self, server: str, sha256: str) -> None:
        """The upload is over."""
        self._path(server, sha256).unlink(missing_ok=True)

    def _path(self, server: str, sha256: str) -> Path:
        return self.folder / f"{hashlib.sha256(server.encode()).hexdigest()[:12]}-{sha256}.json"


def stored_file(connection: Connection, sha256: str) -> str | None:
    """Return the id of the stored file with this digest, if the server has one."""
    path = f"/v1/files/sha256/{sha256}"
    response = connection.send("HEAD", path, repeatable=True)
    if not response.is_success and response.status_code != 404:
        response = connection.send("GET", path, repeatable=True)  # a HEAD answer has no body to explain itself with
    if response.status_code == 404:
        return None
    raise_for(response)
    return str(response.headers["x-file-id"])


def send_file(
    connection: Connection, path: Path, sha256: str, *, name: str, purpose: Purpose, journal: Journal, on_bytes: OnBytes
) -> FileObject:
    """Upload one file and return it as stored.

    Raises:
        ModepressApiError: the server refused or failed, or the digest disagreed at completion.
    """
    size = path.stat().st_size
    upload, arrived = _begin(connection, path, sha256, name=name, purpose=purpose, journal=journal)
    starts = range(0, size, upload.part_bytes)

    def send(number: int) -> str:
        with path.open("rb") as file:
            file.seek(starts[number])
            data = file.read(upload.part_bytes)
        part = arrived.get(number)
        if part is None or part.bytes != len(data) or part.sha256 != hashlib.sha256(data).hexdigest():
            part = _send_part(connection, upload.id, number, data)
        on_bytes(len(data))
        return part.id

    with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
        part_ids = tuple(pool.map(send, range(len(starts))))
    done = connection.call(
        "POST",
        f"/v1/uploads/{upload.id}/complete",
        Upload,
        body=CompleteRequest(part_ids=part_ids, sha256=sha256),
    )
    journal.forget(connection.url, sha256)
    if done.file is None:
        raise RuntimeError(f"upload {upload.id} is {done.status} but names no file")
    return done.file


def _begin(
    connection: Connection, path: Path, sha256: str, *, name: str, purpose: Purpose, journal: Journal
) -> tuple[Upload, dict[int, UploadPart]]:
    """Find the upload an earlier run began, with the parts that arrived; or begin a new one."""
    known = journal.find(connection.url, sha256)
    if known is not None:
        try:
            upload = connection.call("GET", f"/v1/uploads/{known}", Upload)
        except ModepressApiError as error:
            if error.status != 404:
                raise
        else:
            if upload.status == "pending":
                return upload, _arrived(connection, upload.id)
    request = UploadRequest(filename=name, purpose=purpose, bytes=path.stat().st_size, sha256=sha256)
    upload = connection.call("POST", "/v1/uploads", Upload, body=request)
    journal.note(connection.url, sha256, upload.id)
    return upload, {}


def _arrived(connection: Connection, upload_id: str) -> dict[int, UploadPart]:
    parts, after = dict[int, UploadPart](), None
    while True:
        params = {"limit": 100} if after is None else {"limit": 100, "after": after}
        page = connection.call("GET", f"/v1/uploads/{upload_id}/parts", Page[UploadPart], params=params)
        parts.update({part.number: part for part in page.data})
        after = page.last_id
        if not page.has_more:
            return parts


def _send_part(connection: Connection, upload_id: str, number: int, data: bytes) -> UploadPart:
    response = connection.send(
        "POST",
        f"/v1/uploads/{upload_id}/parts",
        data={"number": str(number)},
        files={"data": (f"part-{number}", data, "application/octet-stream")},
        repeatable=True,  # a part sent again under its number replaces the first
    )
    raise_for(response)
    return UploadPart.model_validate_json(response.content, extra="ignore")
