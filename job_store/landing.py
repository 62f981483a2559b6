"""Bytes on their way to disk: a temporary file with a running digest and a limit, durable when it is finished."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from api_schemas.errors import InsufficientStorage, TooLarge

COPY_BYTES = 1024**2


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Landed:
    """A finished temporary file: its bytes are on disk."""

    path: Path
    bytes: int
    sha256: str


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk or quota into InsufficientStorage `disk_full`; every other OSError goes through."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"no space left in the data folder for {what}; free space on the server and send it again"
        raise InsufficientStorage("disk_full", message) from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock between threads and processes of this machine while the body runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Landing:
    """A temporary file being written. Use as a context manager: unless finished, it leaves nothing behind."""

    def __init__(self, path: Path, *, limit: int, too_large: TooLarge, what: str) -> None:
        self._path = path
        self._limit = limit
        self._too_large = too_large
        self._what = what
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._finished = False
        with disk_errors(what):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Append bytes. Raises TooLarge beyond the limit and InsufficientStorage on a full disk."""
        self._bytes += len(chunk)
        if self._bytes > self._limit:
            raise self._too_large
        self._sha256.update(chunk)
        with disk_errors(self._what):
            self._file.write(chunk)

    def append(self, source: Path, also: Digest | None = None) -> None:
        """Append a whole file in constant memory, feeding `also` with the same bytes."""
        with source.open("rb") as file:
            while chunk := file.read(COPY_BYTES):
                self.write(chunk)
                if also is not None:
                    also.update(chunk)

    def finish(self) -> Landed:
        """Make the bytes durable and say what they are; the caller renames the file to where it belongs."""
        with disk_errors(self._what):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._finished = True
        return Landed(path=self._path, bytes=self._bytes, sha256=self._sha256.hexdigest())

    def __enter__(self) -> "Landing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._finished:
            return
        try:
            with disk_errors(self._what):
                self._file.close()  # writes what is still buffered, so it can fail like a write
        finally:
            self._path.unlink(missing_ok=True)
