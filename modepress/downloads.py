"""Fetching a model's files: resumed where an earlier try stopped, checked, whole under their names or not there."""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import quote

from api_schemas.base import Frozen
from api_schemas.errors import Conflict, InsufficientStorage, InvalidRequest, Unavailable
from api_schemas.models import ModelFileObject
from api_schemas.relative_paths import check_relative_paths
from modepress.api_error import Unreachable
from modepress.connection import Connection
from modepress.model_folder import READ_BYTES, sha256_of

CUTS = 5  # in a row without a single byte
PAUSE_SECONDS = 1.0

OnBytes = Callable[[int], None]


class PulledFile(Frozen):
    """What became of one file."""

    path: str
    bytes: int
    sha256: str
    outcome: Literal["fetched", "resumed", "already there"]


def chosen(files: Sequence[ModelFileObject], only: Sequence[str], model_id: str) -> list[ModelFileObject]:
    """Pick the files that `only` names: what they belong to, a file, or a folder.

    `vllm` brings the checkpoint along, for that export is a configuration beside its weights.

    Raises:
        InvalidRequest: `nothing_to_pull` when a word names nothing the model has.
    """
    picked = set[str]()
    for word in only:
        owners = {"vllm": ("vllm", "checkpoint")}.get(word, (word,))
        named = [file.path for file in files if _named(file, word)]
        if not named:
            there = ", ".join(sorted({file.belongs_to for file in files})) or "no files at all"
            message = f"model {model_id!r} has no {word!r}; it has: {there}; `modepress files {model_id}` lists all"
            raise InvalidRequest("nothing_to_pull", message, "only")
        picked.update(named, (file.path for file in files if file.belongs_to in owners))
    return [file for file in files if not only or file.path in picked]


def _named(file: ModelFileObject, word: str) -> bool:
    return word in (file.belongs_to, file.path) or file.path.startswith(word.rstrip("/") + "/")


def fetch_all(
    connection: Connection,
    model_id: str,
    files: Sequence[ModelFileObject],
    folder: Path,
    on_progress: Callable[[str, int], None],
) -> list[PulledFile]:
    """Bring files into a folder.

    Args:
        files: each with its digest.
        on_progress: called with a file's name and the bytes that are now here.

    Raises:
        InvalidRequest: `unsafe_path`: the server's name for a file could leave the folder; `not_writable`.
        Conflict: `file_differs`: a file of that name is there and is another one; nothing was fetched.
        InsufficientStorage: `disk_full`.
        Unavailable: `digest_mismatch`: what came is not what the server listed.
        ModepressApiError: the server refused or failed, or was lost too often.
    """
    check_relative_paths([file.path for file in files])  # the server is not trusted with this disk
    there = {file.path for file in files if _is_there(folder / file.path, file)}
    _require_space(folder, sum(file.bytes for file in files if file.path not in there))
    pulled = list[PulledFile]()
    for file in files:
        on_bytes = partial(on_progress, file.path)
        if file.path in there:
            on_bytes(file.bytes)
            pulled.append(_pulled(file, "already there"))
        else:
            resumed = _fetch(connection, model_id, file, folder / file.path, on_bytes)
            pulled.append(_pulled(file, "resumed" if resumed else "fetched"))
    return pulled


def _pulled(file: ModelFileObject, outcome: Literal["fetched", "resumed", "already there"]) -> PulledFile:
    return PulledFile(path=file.path, bytes=file.bytes, sha256=_digest_of(file), outcome=outcome)


def _digest_of(file: ModelFileObject) -> str:
    if file.sha256 is None:
        raise RuntimeError(f"the server counted digests and names none of {file.path!r}")
    return file.sha256


def _is_there(target: Path, file: ModelFileObject) -> bool:
    """Whether the very file is there. Raises Conflict `file_differs` when another one has its name."""
    if not os.path.lexists(target):
        return False
    if target.is_file() and not target.is_symlink() and target.stat().st_size == file.bytes:
        if sha256_of(target) == _digest_of(file):
            return True
        reason = "its bytes are others"
    else:
        reason = f"it is no file of {file.bytes} bytes"
    message = f"{target} exists and is not what the server has: {reason}; move it away or pull into another folder"
    raise Conflict("file_differs", message, "into")


def _require_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"{needed} bytes are to come and {existing} has {free} free; free some or pull elsewhere"
        raise InsufficientStorage("disk_full", message, "into")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn what a disk refuses into errors that name the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left for {target}; free some and pull again: it goes on where it stopped"
            raise InsufficientStorage("disk_full", message, "into") from error
        message = f"{target} cannot be written: {error.strerror}; pull into another folder"
        raise InvalidRequest("not_writable", message, "into") from error


def _fetch(connection: Connection, model_id: str, file: ModelFileObject, target: Path, on_bytes: OnBytes) -> bool:
    """Fetch one file beside its place, check it, move it there; returns whether an earlier try had begun it."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # The digest in its name: a part of another version of this file is never gone on with.
        part = target.with_name(f".{target.name}.{_digest_of(file)[:16]}.part")
        with part.open("a+b") as output:
            received = _Received(output, on_bytes)
            resumed = received.bytes > 0
            _receive(connection, f"/v1/models/{model_id}/files/{quote(file.path)}/content", file.bytes, received)
            output.flush()
            os.fsync(output.fileno())
        if received.digest.hexdigest() != _digest_of(file):
            part.unlink()
            message = f"{file.path!r} came with another SHA-256 than the server lists; pull it again"
            raise Unavailable("digest_mismatch", message, "path")
        part.replace(target)
        _sync_folder(target.parent)
    return resumed


class _Received:
    """What has come of a file, in an earlier try or now: on disk, counted and digested."""

    def __init__(self, output: BinaryIO, on_bytes: OnBytes) -> None:
        self._output = output
        self._on_bytes = on_bytes
        self.digest = hashlib.sha256()
        self.bytes = 0
        output.seek(0)
        for piece in iter(partial(output.read, READ_BYTES), b""):
            self._count(piece)

    def append(self, piece: bytes) -> None:
        self._output.write(piece)
        self._count(piece)

    def _count(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.bytes += len(piece)
        self._on_bytes(len(piece))


def _receive(connection: Connection, path: str, size: int, received: _Received) -> None:
    """Ask for what is missing until all has come; a lost connection is taken up again, unless it gives nothing."""
    fruitless = 0
    while received.bytes < size:
        before = received.bytes
        # A proxy that packs bytes would give other lengths than the server's.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={before}-"}
        try:
            with connection.stream("GET", path, headers=headers) as response:
                skip = 0 if response.status_code == 206 else before  # somebody on the way knows no ranges
                for piece in response.iter_raw():
                    received.append(piece[skip:])
                    skip = max(0, skip - len(piece))
        except Unreachable:
            fruitless = fruitless + 1 if received.bytes == before else 0
            if fruitless > CUTS:
                raise
            time.sleep(PAUSE_SECONDS)
        else:
            if received.bytes == before:
                return  # the file has become shorter: its digest will say so


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
