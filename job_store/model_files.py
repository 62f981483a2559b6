"""The files of a model's folder: listed with what is known of them, and opened without leaving the folder.

Links, hidden files and names that no client could write safely are no part of a model: neither listed nor opened.
"""

import errno
import hashlib
import json
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Literal

from sqlalchemy import Engine, select

from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.listing import Page
from api_schemas.models import ModelFileObject
from api_schemas.relative_paths import check_relative_path, unsafe
from job_store.database import reading
from job_store.files import OpenedFile
from job_store.models import ModelStore
from job_store.tables import FileRow, ModelRow
from preflight.checkpoint import EXPORTS, MANIFEST

SERVE = "serve.json"
REMEMBERED_DIGESTS = 4096

Digests = Literal["known", "all"]


@dataclass(frozen=True)
class _Found:
    path: str
    bytes: int
    identity: tuple[int, int, int, int]


class ModelFileStore:
    """Lists and opens the files of registered models."""

    def __init__(self, engine: Engine, models: ModelStore) -> None:
        self._engine = engine
        self._models = models

    def list(self, model_id: str, *, after: str | None, limit: int, digests: Digests) -> Page[ModelFileObject]:
        """Return a model's files in the order of their paths.

        Args:
            model_id: of a model that is ready.
            after: path of the last file of the page before; it need not exist.
            limit: files at most.
            digests: `known`: what the manifest of an artifact or the uploads say; `all`: what nobody has said is
                counted now, which reads the files once.

        Raises:
            NotFound: `model_not_found`.
            Conflict: `model_not_ready`, `model_folder_missing`.
        """
        folder = self._models.path_of(model_id)
        found = sorted(_walk(_require_folder(folder, model_id)), key=lambda file: file.path)
        start = 0 if after is None else bisect_right(found, after, key=lambda file: file.path)
        known, layout = self._recorded(model_id, folder)
        page = found[start : start + limit]
        data = [_described(file, _digest(folder, file, known, digests), layout) for file in page]
        ends = (data[0].path, data[-1].path) if data else (None, None)
        return Page[ModelFileObject](data=data, has_more=start + limit < len(found), first_id=ends[0], last_id=ends[1])

    def open(self, model_id: str, path: str) -> OpenedFile:
        """Open one file. It can be read to its end even when the model is deleted meanwhile.

        Raises:
            NotFound: `model_not_found`, `model_file_not_found`.
            InvalidRequest: `unsafe_path`, `symlink_refused`.
            Conflict: `model_not_ready`, `model_folder_missing`.
        """
        folder = self._models.path_of(model_id)
        check_relative_path(path, "path")
        if any(part.startswith(".") for part in path.split("/")):
            raise _missing(path)
        digests, _ = self._recorded(model_id, _require_folder(folder, model_id))
        handle = open_inside(folder, path)
        status = os.fstat(handle.fileno())
        changed = f"{status.st_mtime_ns:x}-{status.st_size:x}"
        return OpenedFile(handle, status.st_size, digests.get(path, changed))

    def _recorded(self, model_id: str, folder: Path) -> tuple[Mapping[str, str], str | None]:
        """What was written down when the files came to be: digests by path, and the layout of an artifact of ours."""
        with reading(self._engine) as session:
            row = session.get(ModelRow, model_id)
            if row is not None and row.origin == "job":
                return _manifest(folder)
            if row is None or row.origin != "upload":
                return {}, None
            paths = [(str(file["file_id"]), str(file["path"])) for file in row.request["files"]]
            wanted = select(FileRow.id, FileRow.sha256).where(FileRow.id.in_({file_id for file_id, _ in paths}))
            stored = {file_id: sha256 for file_id, sha256 in session.execute(wanted)}
            return {path: stored[file_id] for file_id, path in paths if file_id in stored}, None


def open_inside(folder: Path, path: str) -> BinaryIO:
    """Open a regular file below a folder. Each step is taken from the folder before it, and no link is followed.

    Raises:
        NotFound: `model_file_not_found`.
        InvalidRequest: `symlink_refused`.
    """
    *folders, name = path.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders:
            inner = _step(here, part, os.O_DIRECTORY, path)
            os.close(here)
            here = inner
        # A pipe without a writer would block without O_NONBLOCK; on regular files it changes nothing.
        descriptor = _step(here, name, os.O_NONBLOCK, path)
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _missing(path)
    return os.fdopen(descriptor, "rb")


def _step(here: int, name: str, flags: int, path: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=here)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise
        raise (_linked(path) if _is_link(here, name) else _missing(path)) from error


def _is_link(here: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _missing(path: str) -> NotFound:
    message = f"the model has no file {path!r}; GET /v1/models/MODEL/files lists those there are"
    return NotFound("model_file_not_found", message, "path")


def _linked(path: str) -> InvalidRequest:
    message = f"path {path!r} is or crosses a symbolic link, which is not followed; put a copy of the file there"
    return InvalidRequest("symlink_refused", message, "path")


def _require_folder(folder: Path, model_id: str) -> Path:
    if folder.is_dir():
        return folder
    message = f"the folder of model {model_id!r} is gone from the server; delete the model and register it again"
    raise Conflict("model_folder_missing", message, "model")


def _walk(folder: Path) -> Iterator[_Found]:
    for root, folders, names, descriptor in os.fwalk(folder, onerror=_go_on_when_gone):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = (Path(root) / name).relative_to(folder).as_posix()
            if name.startswith(".") or unsafe(path) is not None:
                continue
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue  # deleted while it was listed
            if stat.S_ISREG(status.st_mode):
                identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                yield _Found(path, status.st_size, identity)


def _go_on_when_gone(error: OSError) -> None:
    """A model that is deleted while it is listed has no files; anything else is an error."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _described(file: _Found, sha256: str | None, layout: str | None) -> ModelFileObject:
    owner = _owner(file.path)
    return ModelFileObject(
        path=file.path,
        bytes=file.bytes,
        sha256=sha256,
        belongs_to=owner,
        layout=layout if owner == "checkpoint" else None,
    )


def _owner(path: str) -> str:
    """What a file belongs to, by its place: exports lie under exports/, one file or one folder each (ADR 0008)."""
    if not path.startswith(EXPORTS):
        return "checkpoint"
    inner = path.removeprefix(EXPORTS)
    if "/" in inner:
        return inner.split("/")[0]
    return "gguf" if inner.endswith(".gguf") else "exports"


def _manifest(folder: Path) -> tuple[Mapping[str, str], str | None]:
    """What an artifact that this service has written says of itself."""
    files = dict(json.loads((folder / MANIFEST).read_bytes())["files"])
    return files, json.loads((folder / SERVE).read_bytes())["layout"] if SERVE in files else None


def _digest(folder: Path, file: _Found, known: Mapping[str, str], digests: Digests) -> str | None:
    if file.path in known:
        return known[file.path]
    # The manifest cannot hold its own digest, and it is small.
    return _count(folder, file.path, file.identity) if digests == "all" or file.path == MANIFEST else None


@lru_cache(maxsize=REMEMBERED_DIGESTS)
def _count(folder: Path, path: str, identity: tuple[int, int, int, int]) -> str:
    """SHA-256 of a file's bytes; `identity` makes a changed file another one."""
    del identity
    digest = hashlib.sha256()
    with open_inside(folder, path) as file:
        for piece in iter(partial(file.read, 1024**2), b""):
            digest.update(piece)
    return digest.hexdigest()
