"""The file store: bytes under their SHA-256, shared by equal files, gone with the last row that names them."""

import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Engine, and_, exists, func, or_, select, update
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, NotFound, TooLarge
from api_schemas.files import FileObject
from api_schemas.jobs import TERMINAL
from api_schemas.listing import Page
from job_store.database import reading, writing
from job_store.landing import Landed, Landing, disk_errors, exclusive
from job_store.layout import Layout, sync_folder
from job_store.owners import SERVER, Viewer
from job_store.quotas import admit_bytes
from job_store.tables import FileRow, JobRow, UploadRow

BLOB_MODE = 0o444  # a blob never changes: models link to it


@dataclass(frozen=True)
class OpenedFile:
    """A stored file, or one of a model's folder, open for reading; whoever has it closes it.

    Attributes:
        handle: at the first byte.
        bytes: how many there are.
        tag: names this content: its SHA-256 where that is known, else its time of change and size.
    """

    handle: BinaryIO
    bytes: int
    tag: str


class FileStore:
    """Stores, finds and deletes the files a viewer sees. A blob comes and goes only under the lock of its digest."""

    def __init__(
        self, engine: Engine, layout: Layout, *, clock: Callable[[], float] = time.time, viewer: Viewer = SERVER
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._clock = clock
        self._viewer = viewer

    def land(self, *, limit: int, what: str = "the file") -> Landing:
        """Return an empty temporary file for at most `limit` bytes, to be written and given to `keep`."""
        message = f"{what} is larger than the {limit} bytes this server takes at once; send it through POST /v1/uploads"
        error = TooLarge("file_too_large", message, "file")
        return Landing(self._layout.scratch("file"), limit=limit, too_large=error, what=what)

    def keep(
        self,
        landed: Landed,
        *,
        filename: str,
        purpose: str,
        also: Callable[[Session, FileRow], None] | None = None,
    ) -> FileObject:
        """Move finished bytes into the store and record them; `also` writes in the same transaction.

        Raises:
            NotPermitted: `byte_quota_exceeded`.
        """
        row = FileRow(
            id=f"file-{secrets.token_hex(12)}",
            created_at=self._clock(),
            filename=filename,
            purpose=purpose,
            bytes=landed.bytes,
            sha256=landed.sha256,
            owned_by=self._viewer.owner,
        )
        try:
            with disk_errors(filename), self._locked(landed.sha256):
                with writing(self._engine) as session:
                    if also is None:  # else the bytes count already, as those of an upload
                        admit_bytes(session, self._viewer, landed.bytes, "file")
                    session.add(row)
                    session.flush()
                    if also is not None:
                        also(session, row)
                    self._place(landed)  # before the commit: a row never precedes its bytes
        finally:
            landed.path.unlink(missing_ok=True)
        return to_file(row)

    def get(self, file_id: str, *, param: str = "file_id") -> FileObject:
        """Return a file's record. Raises NotFound, which names `param`."""
        with reading(self._engine) as session:
            return to_file(self._row(session, file_id, param))

    def path_of(self, file_id: str, *, param: str = "file_id") -> Path:
        """Return where a file's bytes lie; they must not be changed. Raises NotFound, which names `param`."""
        return self._layout.blob(self.get(file_id, param=param).sha256)

    def open(self, file_id: str) -> OpenedFile:
        """Open a file; it can be read to its end even when it is deleted meanwhile. Raises NotFound."""
        file = self.get(file_id)
        try:
            handle = self._layout.blob(file.sha256).open("rb")
        except FileNotFoundError as error:  # deleted between the two lines above
            raise _missing(file_id, "file_id") from error
        return OpenedFile(handle, file.bytes, file.sha256)

    def find(self, sha256: str) -> FileObject | None:
        """Return the newest file with this digest, or None: what `HEAD` by digest asks.

        Files of others do not count: who knows a digest does not have the bytes.
        """
        statement = self._viewer.only(select(FileRow), FileRow.owned_by).where(FileRow.sha256 == sha256)
        with reading(self._engine) as session:
            statement = statement.order_by(FileRow.created_at.desc()).limit(1)
            row = session.scalars(statement).one_or_none()
            return None if row is None else to_file(row)

    def list(self, *, after: str | None, limit: int, purpose: str | None = None) -> Page[FileObject]:
        """Return files, newest first. Raises NotFound when `after` names no file."""
        statement = self._viewer.only(select(FileRow), FileRow.owned_by)
        statement = statement.order_by(FileRow.created_at.desc(), FileRow.id.desc()).limit(limit + 1)
        if purpose is not None:
            statement = statement.where(FileRow.purpose == purpose)
        with reading(self._engine) as session:
            if after is not None:
                last = self._row(session, after, "after")
                older = and_(FileRow.created_at == last.created_at, FileRow.id < last.id)
                statement = statement.where(or_(FileRow.created_at < last.created_at, older))
            found = [to_file(row) for row in session.scalars(statement)]
        data = found[:limit]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return Page[FileObject](data=data, has_more=len(found) > limit, first_id=ends[0], last_id=ends[1])

    def delete(self, file_id: str) -> None:
        """Forget a file, and its bytes when no other file has the same.

        Models registered from it keep theirs. Raises NotFound, or Conflict while a waiting or running job reads it.
        """
        sha256 = self.get(file_id).sha256
        with self._locked(sha256):
            with writing(self._engine) as session:
                row = self._row(session, file_id)
                _refuse_in_use(session, file_id)
                session.execute(update(UploadRow).where(UploadRow.file_id == file_id).values(file_id=None))
                session.delete(row)
                session.flush()
                shared = session.scalar(select(func.count()).where(FileRow.sha256 == sha256))
            if not shared:
                self._layout.blob(sha256).unlink(missing_ok=True)

    def sweep(self, *, older_than: float) -> None:
        """Remove blobs that no row names and temporary files of more than `older_than` seconds: traces of a crash."""
        for blob in self._layout.home.glob("blobs/??/*"):
            with self._locked(blob.name), reading(self._engine) as session:
                if not session.scalar(select(exists().where(FileRow.sha256 == blob.name))):
                    blob.unlink(missing_ok=True)
        for temporary in self._layout.home.glob("tmp/file.*"):
            if temporary.stat().st_mtime < time.time() - older_than:
                temporary.unlink(missing_ok=True)

    def _row(self, session: Session, file_id: str, param: str = "file_id") -> FileRow:
        row = None if "\0" in file_id else session.get(FileRow, file_id)
        if row is None or not self._viewer.sees(row.owned_by):
            raise _missing(file_id, param)
        return row

    def _locked(self, sha256: str) -> AbstractContextManager[None]:
        return exclusive(self._layout.home / "blobs" / f".{sha256[:2]}.lock")

    def _place(self, landed: Landed) -> None:
        target = self._layout.blob(landed.sha256)
        if target.exists():
            return
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
            sync_folder(target.parent.parent)
        landed.path.chmod(BLOB_MODE)
        landed.path.replace(target)
        sync_folder(target.parent)


def to_file(row: FileRow) -> FileObject:
    """Return the client's view of a row."""
    return FileObject(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        sha256=row.sha256,
    )


def _missing(file_id: str, param: str) -> NotFound:
    return NotFound("file_not_found", f"no file has id {file_id!r}; GET /v1/files lists those there are", param)


def _refuse_in_use(session: Session, file_id: str) -> None:
    for job in session.scalars(select(JobRow).where(JobRow.status.not_in(TERMINAL))):
        texts = (job.recipe.get("calibration") or {}, job.recipe.get("evaluation") or {})
        if any(text.get("file_id") == file_id for text in texts):
            message = f"file {file_id!r} is read by job {job.id!r} ({job.status}); cancel the job or wait for its end"
            raise Conflict("file_in_use", message, "file_id")
