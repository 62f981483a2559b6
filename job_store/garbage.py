"""What nobody needs any more, by the operator's rules: listed, or removed; safe beside a running service."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Delete, Engine, delete, func, select

from api_schemas.base import Frozen
from api_schemas.errors import Conflict, NotFound
from api_schemas.jobs import TERMINAL
from job_store.database import reading, writing
from job_store.files import FileStore
from job_store.layout import Layout, remove_tree
from job_store.leftovers import attempts, clear_job
from job_store.models import ModelStore
from job_store.settings import Settings
from job_store.tables import AuditRow, DeliveryRow, FileRow, JobRow, ModelRow, UploadRow
from job_store.uploads import UploadStore

DAY = 86400.0
GRACE_SECONDS = 3600.0  # a folder that has come so lately may be on its way to its row
DELIVERY_DAYS = 30


class Garbage(Frozen):
    """One thing that can go."""

    kind: str
    what: str
    bytes: int
    why: str


@dataclass(frozen=True)
class _Found:
    garbage: Garbage
    remove: Callable[[], object]


class Collector:
    """Finds and removes garbage of one data folder and its database."""

    def __init__(
        self, engine: Engine, layout: Layout, settings: Settings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._settings = settings
        self._clock = clock
        self._files = FileStore(engine, layout, clock=clock)
        self._uploads = UploadStore(engine, layout, settings, self._files, clock=clock)
        self._models = ModelStore(engine, layout, settings, files=self._files, clock=clock)

    def collect(self, *, dry_run: bool) -> list[Garbage]:
        """Return what can go, and unless this is a dry run remove it. What has come into use meanwhile stays."""
        gone = []
        for found in [*self._job_remains(), *self._uploads_over(), *self._strays(), *self._old(), *self._old_rows()]:
            if not dry_run:
                try:
                    found.remove()
                except (Conflict, NotFound):  # a job has begun to read it, or somebody else was faster
                    continue
            gone.append(found.garbage)
        return gone

    def _job_remains(self) -> Iterator[_Found]:
        keep = self._settings.keep_job_days * DAY
        for folder in sorted(self._layout.home.glob("jobs/*")):
            with reading(self._engine) as session:
                row = session.get(JobRow, folder.name)
                ended = row is None or row.status in TERMINAL
                finished = self._clock() if row is None else row.finished_at or self._clock()
            remains = [path for path in (folder / "blocks", *attempts(folder)) if path.exists()]
            if ended and remains:
                size = sum(map(_size, remains))
                why = "blocks and attempts of a job that has ended"
                clear = _bound(clear_job, self._engine, self._layout, folder.name)
                yield _Found(Garbage(kind="job remains", what=folder.name, bytes=size, why=why), clear)
            elif ended and keep and finished < self._clock() - keep:
                why = f"record of a job that ended over {self._settings.keep_job_days} days ago"
                yield _folder("job folder", folder, why)

    def _uploads_over(self) -> Iterator[_Found]:
        now = self._clock()
        with reading(self._engine) as session:
            live = select(UploadRow.id).where(UploadRow.status == "pending", UploadRow.expires_at > now)
            pending = set(session.scalars(live))
        for folder in sorted(self._layout.home.glob("uploads/upload_*")):
            if folder.name not in pending:
                garbage = Garbage(
                    kind="upload", what=folder.name, bytes=_size(folder), why="expired, cancelled or completed"
                )
                yield _Found(garbage, self._uploads.sweep)

    def _strays(self) -> Iterator[_Found]:
        """Bytes that no row names, and scratch that nobody came back for: traces of crashes."""
        old = self._clock() - self._settings.upload_ttl_seconds
        for blob in sorted(self._layout.home.glob("blobs/??/*")):
            with reading(self._engine) as session:
                named = session.scalar(select(func.count()).where(FileRow.sha256 == blob.name))
            if not named:
                garbage = Garbage(kind="blob", what=blob.name, bytes=_size(blob), why="no file has these bytes")
                yield _Found(garbage, _bound(self._files.sweep, older_than=self._settings.upload_ttl_seconds))
        for folder in sorted(path for path in self._layout.home.glob("models/*") if not path.name.startswith(".")):
            with reading(self._engine) as session:
                known = session.get(ModelRow, folder.name) is not None
            # The time of change, which a rename sets: an artifact is older than its coming here.
            if not known and folder.lstat().st_ctime < self._clock() - GRACE_SECONDS:
                yield _folder("model folder", folder, "no model has this folder")
        for pattern, kind in (("tmp/*", "scratch"), ("pushes/*", "push")):
            for path in sorted(self._layout.home.glob(pattern)):
                if path.lstat().st_mtime < old:
                    yield _folder(kind, path, "older than an upload may be")

    def _old(self) -> Iterator[_Found]:
        """Files and artifacts beyond the days for which the operator keeps them."""
        now, files, artifacts = self._clock(), self._settings.keep_file_days, self._settings.keep_artifact_days
        with reading(self._engine) as session:
            old = select(FileRow).where(FileRow.created_at < now - files * DAY)
            rows = session.scalars(old).all() if files else ()
            made = select(ModelRow.id).where(ModelRow.origin == "job", ModelRow.created_at < now - artifacts * DAY)
            names = session.scalars(made).all() if artifacts else ()
        for row in rows:
            garbage = Garbage(kind="file", what=row.id, bytes=row.bytes, why=f"made over {files} days ago")
            yield _Found(garbage, _bound(self._files.delete, row.id))
        for name in names:
            size = _size(self._layout.model(name))
            garbage = Garbage(kind="artifact", what=name, bytes=size, why=f"made over {artifacts} days ago")
            yield _Found(garbage, _bound(self._models.delete, name))

    def _old_rows(self) -> Iterator[_Found]:
        now, days = self._clock(), self._settings.keep_audit_days
        settled = (DeliveryRow.created_at < now - DELIVERY_DAYS * DAY, DeliveryRow.status != "pending")
        over = AuditRow.created_at < now - days * DAY
        with reading(self._engine) as session:
            sent = session.scalar(select(func.count()).select_from(DeliveryRow).where(*settled)) or 0
            lines = session.scalar(select(func.count()).select_from(AuditRow).where(over)) or 0
        if sent:
            garbage = Garbage(kind="deliveries", what=str(sent), bytes=0, why=f"older than {DELIVERY_DAYS} days")
            yield _Found(garbage, _bound(self._delete, delete(DeliveryRow).where(*settled)))
        if days and lines:
            garbage = Garbage(kind="audit lines", what=str(lines), bytes=0, why=f"older than {days} days")
            yield _Found(garbage, _bound(self._delete, delete(AuditRow).where(over)))

    def _delete(self, statement: Delete) -> None:
        with writing(self._engine) as session:
            session.execute(statement)


def _folder(kind: str, path: Path, why: str) -> _Found:
    return _Found(Garbage(kind=kind, what=path.name, bytes=_size(path), why=why), _bound(_remove, path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    total = 0
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        with suppress(FileNotFoundError):  # somebody is removing it too
            status = file.lstat()
            total += status.st_size if not file.is_dir() else 0
    return total


def _bound(function: Callable[..., object], *arguments: object, **named: object) -> Callable[[], object]:
    return lambda: function(*arguments, **named)
