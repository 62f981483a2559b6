"""Backup and restore: the rows as JSON and the bytes they name, whole or not at all, between any two databases.

backup.json     format, schema's revision, when, how many rows and files
rows.jsonl      one row per line: table and values
files.jsonl     one file per line: path below this folder, bytes, SHA-256
blobs/ models/ jobs/    as in the data folder, without blocks, attempts and uploads under way
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from sqlalchemy import JSON, Connection, Engine, MetaData, Table, func, null, select, text, update
from sqlalchemy.orm import Session

from api_schemas.base import Frozen
from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.relative_paths import check_relative_path
from job_store.database import upgrade
from job_store.files import BLOB_MODE
from job_store.layout import Layout, remove_tree, sync_tree
from job_store.tables import ApiKeyRow, Base, FileRow, JobRow, ModelRow, UploadRow

FORMAT = 1
KEPT = ("blobs", "models", "jobs")
PIECE_BYTES = 1024**2
HELD = ("running", "cancelling")
OUTSIDE_JOBS = ("blocks", "attempt-")


class BackupFacts(Frozen):
    """What a backup holds."""

    format: int
    revision: str
    created_at: int
    rows: int
    files: int
    bytes: int


def back_up(engine: Engine, layout: Layout, target: Path) -> BackupFacts:
    """Write a backup while the service goes on.

    Bytes are copied before and after the rows are read in one snapshot, so that each row finds its bytes.

    Raises:
        Conflict: `target_exists`; `backup_raced`: something was deleted while it was copied.
    """
    if target.exists():
        raise Conflict("target_exists", f"{target} exists; name another folder", "target")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(mode=0o700, parents=True)
        copied: dict[str, tuple[int, str]] = {}
        _copy_all(layout, partial, copied)
        rows = _write_rows(engine, partial / "rows.jsonl")
        _copy_all(layout, partial, copied)
        _require_bytes(partial)
        with (partial / "files.jsonl").open("w") as file:
            for path, (size, digest) in sorted(copied.items()):
                file.write(json.dumps({"path": path, "bytes": size, "sha256": digest}) + "\n")
        facts = BackupFacts(
            format=FORMAT,
            revision=_revision(engine),
            created_at=int(time.time()),
            rows=rows,
            files=len(copied),
            bytes=sum(size for size, _ in copied.values()),
        )
        (partial / "backup.json").write_text(facts.model_dump_json(indent=1) + "\n")
        sync_tree(partial)
        partial.rename(target)
        return facts
    finally:
        remove_tree(partial)


def restore(engine: Engine, layout: Layout, source: Path) -> BackupFacts:
    """Fill an empty database and data folder from a backup. The service must not run.

    Jobs that were running wait again, from their start; uploads that were under way have expired.

    Raises:
        NotFound: `backup_not_found`.
        InvalidRequest: `backup_damaged`: a file is missing or has other bytes; nothing was restored.
        Conflict: `not_empty`: the database or the data folder holds something.
    """
    facts = _facts(source)
    files = list(_read_files(source))
    for path, size, digest in files:
        _check(source / path, path, size, digest)
    upgrade(engine, facts.revision)
    _require_empty(engine, layout)
    layout.prepare()
    for path, _, _ in files:
        place = layout.home / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, place)
        if path.startswith("blobs/"):
            place.chmod(BLOB_MODE)
    for folder in KEPT:
        sync_tree(layout.home / folder)
    with engine.begin() as connection:
        _insert(connection, source / "rows.jsonl")
    upgrade(engine)
    _settle(engine, layout)
    return facts


def _copy_all(layout: Layout, target: Path, copied: dict[str, tuple[int, str]]) -> None:
    for folder in KEPT:
        for root, folders, names in os.walk(layout.home / folder):
            if folder == "jobs":
                folders[:] = [name for name in folders if not name.startswith(OUTSIDE_JOBS)]
            for name in names:
                source = Path(root) / name
                path = str(source.relative_to(layout.home))
                changed = folder == "jobs"  # logs and time lines grow; blobs and models never change
                if name.startswith(".") or source.is_symlink() or (path in copied and not changed):
                    continue
                try:
                    copied[path] = _copy(source, target / path)
                except FileNotFoundError:  # deleted a moment ago: its row is gone too, or `_require_bytes` says so
                    continue


def _copy(source: Path, target: Path) -> tuple[int, str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(PIECE_BYTES):
            digest.update(piece)
            size += writing.write(piece)
    return size, digest.hexdigest()


def _write_rows(engine: Engine, target: Path) -> int:
    level = "REPEATABLE READ" if engine.dialect.name == "postgresql" else None
    snapshot = engine.execution_options(isolation_level=level) if level else engine
    count = 0
    with snapshot.connect() as connection, target.open("w") as file:
        for table in Base.metadata.sorted_tables:
            for row in connection.execute(select(table)).mappings():
                file.write(json.dumps({"table": table.name, "values": dict(row)}) + "\n")
                count += 1
    return count


def _require_bytes(folder: Path) -> None:
    """Each file and model of the rows has its bytes in the backup."""
    for table, values in _read_rows(folder / "rows.jsonl"):
        place = None
        if table == FileRow.__tablename__:
            place = folder / "blobs" / values["sha256"][:2] / values["sha256"]
        elif table == ModelRow.__tablename__ and values["status"] == "ready" and values["origin"] != "path":
            place = folder / "models" / values["id"]
        if place is not None and not place.exists():
            message = f"{table} {values['id']!r} was deleted while it was copied; run the backup again"
            raise Conflict("backup_raced", message)


def _facts(source: Path) -> BackupFacts:
    try:
        facts = BackupFacts.model_validate_json((source / "backup.json").read_bytes())
    except FileNotFoundError as error:
        raise NotFound(
            "backup_not_found", f"{source} holds no backup.json; name a backup's folder", "source"
        ) from error
    if facts.format != FORMAT:
        raise _damaged("backup.json", f"its format is {facts.format}, and {FORMAT} is read")
    return facts


def _read_files(source: Path) -> Iterator[tuple[str, int, str]]:
    with (source / "files.jsonl").open() as file:
        for line in file:
            known = json.loads(line)
            path = str(known["path"])
            check_relative_path(path, "source")
            if path.split("/")[0] not in KEPT:
                raise _damaged(path, "it belongs to no folder of a backup")
            yield path, int(known["bytes"]), str(known["sha256"])


def _check(place: Path, path: str, size: int, digest: str) -> None:
    if place.is_symlink() or not place.is_file():
        raise _damaged(path, "it is missing")
    with place.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if place.stat().st_size != size or found != digest:
        raise _damaged(path, f"its SHA-256 is {found}, not {digest}")


def _damaged(path: str, what: str) -> InvalidRequest:
    message = f"{path} of the backup is damaged: {what}; nothing was restored: use another backup"
    return InvalidRequest("backup_damaged", message, "source")


def _require_empty(engine: Engine, layout: Layout) -> None:
    with Session(engine) as session:
        for table in (FileRow, ModelRow, JobRow, ApiKeyRow):
            if session.scalar(select(func.count()).select_from(table.__table__)):
                message = f"the database has {table.__tablename__} already; restore into a new one"
                raise Conflict("not_empty", message, "home")
    for folder in KEPT:
        if any(path for path in (layout.home / folder).glob("*") if not path.name.startswith(".")):
            raise Conflict("not_empty", f"{layout.home / folder} is not empty; restore into a new data folder", "home")


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open() as file:
        for line in file:
            known = json.loads(line)
            yield known["table"], known["values"]


def _insert(connection: Connection, rows: Path) -> None:
    """Insert the rows into the schema of their time, whose tables are read from the database."""
    tables = MetaData()
    tables.reflect(connection)
    for name, values in _read_rows(rows):
        table = tables.tables[name]
        connection.execute(table.insert(), {key: _value(table, key, value) for key, value in values.items()})
    if connection.dialect.name == "postgresql":  # numbers that we brought along must not be given out again
        for table in tables.sorted_tables:
            if table.autoincrement_column is not None and "id" in table.c and table.c.id.type.python_type is int:
                top = f"(SELECT COALESCE(MAX(id), 0) + 1 FROM {table.name})"  # noqa: S608 (a name of our schema)
                connection.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), {top}, false)"))


def _value(table: Table, key: str, value: Any) -> Any:
    return null() if value is None and isinstance(table.c[key].type, JSON) else value


def _settle(engine: Engine, layout: Layout) -> None:
    """What was under way begins anew, and models lie in this data folder."""
    with Session(engine) as session, session.begin():
        session.execute(update(UploadRow).where(UploadRow.status == "pending").values(status="expired"))
        for job in session.scalars(select(JobRow).where(JobRow.status.in_(HELD))):
            job.status, job.owner, job.lease_until = "queued", None, 0.0
            job.fence += 1  # a worker that still lives elsewhere is fenced off
        for model in session.scalars(select(ModelRow).where(ModelRow.origin != "path")):
            model.path = str(layout.model(model.id))


def _revision(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(MigrationContext.configure(connection).get_current_revision())
