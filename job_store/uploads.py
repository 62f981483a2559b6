"""Resumable uploads: parts in any order, in parallel, repeated; whole files at the end or nothing."""

import hashlib
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, InvalidRequest, NotFound, TooLarge
from api_schemas.files import CompleteRequest, FileObject, Upload, UploadPart, UploadRequest
from api_schemas.listing import Page
from job_store.database import reading, writing
from job_store.files import FileStore, to_file
from job_store.landing import Landed, Landing, exclusive
from job_store.layout import Layout, remove_tree, sync_folder
from job_store.owners import SERVER, Viewer
from job_store.quotas import admit_bytes
from job_store.settings import Settings
from job_store.tables import FileRow, UploadPartRow, UploadRow
from job_store.upload_parts import next_number, ordered_parts, replace_part, to_part

MAX_PART_NUMBER = 10**6


class UploadStore:
    """Uploads under way. Every change of one upload happens under its lock; a row never precedes its bytes."""

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        settings: Settings,
        files: FileStore,
        *,
        clock: Callable[[], float] = time.time,
        viewer: Viewer = SERVER,
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._settings = settings
        self._files = files
        self._clock = clock
        self._viewer = viewer

    def create(self, request: UploadRequest) -> Upload:
        """Open an upload. Raises TooLarge beyond the server's limit, or beyond the room left (code `disk_full`).

        Raises NotPermitted `byte_quota_exceeded` beyond what the owner may have.
        """
        limit = self._settings.max_upload_bytes
        if request.bytes > limit:
            message = f"bytes {request.bytes} exceeds the {limit} bytes this server takes per upload; split the file"
            raise TooLarge("upload_too_large", message, "bytes")
        free = shutil.disk_usage(self._layout.home).free
        if request.bytes > free:
            message = f"bytes {request.bytes} exceeds the {free} bytes free in the data folder; free space there first"
            raise TooLarge("disk_full", message, "bytes")
        self.expire()
        now = self._clock()
        row = UploadRow(
            id=f"upload_{secrets.token_hex(12)}",
            created_at=now,
            expires_at=now + self._settings.upload_ttl_seconds,
            status="pending",
            file_id=None,
            owned_by=self._viewer.owner,
            **request.model_dump(include={"filename", "purpose", "bytes", "sha256"}),
        )
        with writing(self._engine) as session:
            admit_bytes(session, self._viewer, request.bytes, "bytes")
            session.add(row)
        return self._to_upload(row, None)

    def get(self, upload_id: str) -> Upload:
        """Return an upload. Raises NotFound."""
        with reading(self._engine) as session:
            row = self._row(session, upload_id)
            file = session.get(FileRow, row.file_id) if row.file_id else None
            return self._to_upload(row, None if file is None else to_file(file))

    def parts(self, upload_id: str, *, after: str | None, limit: int) -> Page[UploadPart]:
        """Return the parts that arrived, by number: what a client needs to resume. Raises NotFound."""
        with reading(self._engine) as session:
            self._row(session, upload_id)
            statement = select(UploadPartRow).where(UploadPartRow.upload_id == upload_id)
            if after is not None:
                last = None if "\0" in after else session.get(UploadPartRow, after)
                if last is None or last.upload_id != upload_id:
                    raise NotFound("part_not_found", f"upload {upload_id!r} has no part {after!r}", "after")
                statement = statement.where(UploadPartRow.number > last.number)
            rows = session.scalars(statement.order_by(UploadPartRow.number).limit(limit + 1)).all()
        data = [to_part(row) for row in rows[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return Page[UploadPart](data=data, has_more=len(rows) > limit, first_id=ends[0], last_id=ends[1])

    def land(self, upload_id: str) -> Landing:
        """Return an empty temporary file for one part. Raises NotFound, or Conflict when the upload is not pending."""
        self._require_pending(self.get(upload_id))
        limit = self._settings.max_part_bytes
        error = TooLarge("part_too_large", f"a part may hold {limit} bytes; send the rest as further parts", "data")
        folder = self._layout.upload(upload_id)
        return Landing(folder / f"{secrets.token_hex(8)}.tmp", limit=limit, too_large=error, what="a part")

    def add_part(self, upload_id: str, landed: Landed, number: int | None) -> UploadPart:
        """Record a landed part; one sent before under the same number is replaced.

        Raises:
            InvalidRequest: far more bytes arrived than were declared (`upload_size_exceeded`).
            Conflict: the upload was completed, cancelled or expired meanwhile.
        """
        part_id = f"part_{secrets.token_hex(12)}"
        target = self._layout.upload(upload_id) / part_id
        with self._locked(upload_id):
            upload = self.get(upload_id)
            try:
                self._require_pending(upload)
                self._refuse_flood(upload, landed.bytes)
                landed.path.replace(target)
            finally:
                landed.path.unlink(missing_ok=True)
            sync_folder(target.parent)
            with writing(self._engine) as session:
                replaced = replace_part(session, upload_id, number)
                row = UploadPartRow(
                    id=part_id,
                    upload_id=upload_id,
                    number=next_number(session, upload_id) if number is None else number,
                    created_at=self._clock(),
                    bytes=landed.bytes,
                    sha256=landed.sha256,
                )
                session.add(row)
            if replaced is not None:
                (target.parent / replaced).unlink(missing_ok=True)
        return to_part(row)

    def complete(self, upload_id: str, request: CompleteRequest) -> Upload:
        """Join the parts in the order given, check size and digests, and keep the file.

        A repeated call answers like the first. A failed check changes nothing: send the wrong part again and retry.
        With `sha256` declared at creation and already stored, `part_ids` may be empty.

        Raises:
            NotFound: no such upload.
            Conflict: it was cancelled or has expired.
            InvalidRequest: `unknown_part`, `upload_size_mismatch`, `digest_mismatch`.
        """
        with self._locked(upload_id):
            upload = self.get(upload_id)
            if upload.status == "completed":
                return upload
            self._require_pending(upload)
            landed = self._gather(upload, request)

            def mark(session: Session, file: FileRow) -> None:
                row = self._row(session, upload_id)
                row.status, row.file_id = "completed", file.id
                session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id))

            self._files.keep(landed, filename=upload.filename, purpose=upload.purpose, also=mark)
            remove_tree(self._layout.upload(upload_id))
            return self.get(upload_id)

    def cancel(self, upload_id: str) -> Upload:
        """Give an upload up and free its parts; cancelling twice is no error. Raises NotFound, Conflict."""
        with self._locked(upload_id):
            upload = self.get(upload_id)
            if upload.status != "cancelled":
                self._require_pending(upload)
                self._close(upload_id, "cancelled")
            return self.get(upload_id)

    def expire(self) -> None:
        """Free the parts of uploads whose time is over."""
        with reading(self._engine) as session:
            over = select(UploadRow.id).where(UploadRow.status == "pending", UploadRow.expires_at <= self._clock())
            expired = session.scalars(over).all()
        for upload_id in expired:
            with self._locked(upload_id):
                self._close(upload_id, "expired")

    def sweep(self) -> None:
        """Remove the folders of uploads that are over: traces of a crash. Expires what is due as well."""
        self.expire()
        for folder in self._layout.home.glob("uploads/upload_*"):
            with self._locked(folder.name), reading(self._engine) as session:
                row = session.get(UploadRow, folder.name)
                if row is None or row.status != "pending":
                    remove_tree(folder)

    def _close(self, upload_id: str, status: str) -> None:
        with writing(self._engine) as session:
            row = session.get_one(UploadRow, upload_id)  # of whomever: expiry looks at the clock alone
            if row.status != "pending":
                return
            row.status = status
            session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id))
        remove_tree(self._layout.upload(upload_id))

    def _gather(self, upload: Upload, request: CompleteRequest) -> Landed:
        with reading(self._engine) as session:
            declared = self._row(session, upload.id).sha256
            parts = ordered_parts(session, upload.id, request.part_ids)
        stored = self._files.find(declared) if declared and not parts else None
        size = stored.bytes if stored else sum(part.bytes for part in parts)
        if size != upload.bytes:
            message = f"the {len(parts)} parts hold {size} bytes, the upload declared {upload.bytes}; list its parts"
            raise InvalidRequest("upload_size_mismatch", message, "part_ids")
        landed, md5 = self._join(upload, parts, stored)
        for param, expected, actual in (
            ("md5", request.md5, md5),
            ("sha256", request.sha256, landed.sha256),
            ("sha256", declared, landed.sha256),
        ):
            if expected is not None and expected != actual:
                landed.path.unlink()
                message = f"{param} of the {size} bytes received is {actual}, not {expected}; send the wrong part again"
                raise InvalidRequest("digest_mismatch", message, param)
        return landed

    def _join(self, upload: Upload, parts: list[UploadPartRow], stored: FileObject | None) -> tuple[Landed, str]:
        sources = [self._layout.upload(upload.id) / part.id for part in parts]
        if stored is not None:
            sources = [self._layout.blob(stored.sha256)]
        md5 = hashlib.md5(usedforsecurity=False)
        with self._files.land(limit=upload.bytes, what=upload.filename) as landing:
            for source in sources:
                landing.append(source, md5)
            landed = landing.finish()
        return landed, md5.hexdigest()

    def _row(self, session: Session, upload_id: str) -> UploadRow:
        row = None if "\0" in upload_id else session.get(UploadRow, upload_id)
        if row is None or not self._viewer.sees(row.owned_by):
            message = f"no upload has id {upload_id!r}; open one with POST /v1/uploads"
            raise NotFound("upload_not_found", message, "upload_id")
        return row

    def _require_pending(self, upload: Upload) -> None:
        if upload.status == "expired":
            message = f"upload {upload.id!r} expired at {upload.expires_at} (Unix time); open a new one"
            raise Conflict("upload_expired", message, "upload_id")
        if upload.status != "pending":
            raise Conflict(
                "upload_not_pending", f"upload {upload.id!r} is {upload.status}; open a new one", "upload_id"
            )

    def _refuse_flood(self, upload: Upload, arriving: int) -> None:
        # A client that repeats parts without numbering them may send everything twice; more is a mistake or an attack.
        with reading(self._engine) as session:
            held = session.scalar(
                select(func.coalesce(func.sum(UploadPartRow.bytes), 0)).where(UploadPartRow.upload_id == upload.id)
            )
        if (held or 0) + arriving > 2 * upload.bytes + self._settings.max_part_bytes:
            message = f"parts of upload {upload.id!r} hold over twice the {upload.bytes} bytes declared; cancel it"
            raise InvalidRequest("upload_size_exceeded", message, "data")

    def _locked(self, upload_id: str) -> AbstractContextManager[None]:
        digest = hashlib.sha256(upload_id.encode("utf-8", "backslashreplace")).hexdigest()
        return exclusive(self._layout.home / "uploads" / f".{digest[:2]}.lock")

    def _to_upload(self, row: UploadRow, file: FileObject | None) -> Upload:
        over = row.status == "pending" and row.expires_at <= self._clock()
        return Upload.model_validate(
            {
                "id": row.id,
                "bytes": row.bytes,
                "created_at": int(row.created_at),
                "expires_at": int(row.expires_at),
                "filename": row.filename,
                "purpose": row.purpose,
                "status": "expired" if over else row.status,
                "file": file,
                "part_bytes": self._settings.max_part_bytes,
            }
        )
