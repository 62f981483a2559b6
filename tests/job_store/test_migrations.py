"""Each released schema, with data in it, becomes the present one; nothing is lost and old keys still work."""

import hashlib
import json

import pytest
from sqlalchemy import Engine, MetaData, text

from api_schemas.keys import DEFAULT_OWNER
from job_store.database import make_engine, reading, upgrade, writing
from job_store.files import FileStore
from job_store.jobs import IdempotencyKeyReused, JobStore
from job_store.keys import KeyStore
from job_store.layout import Layout
from job_store.tables import Base, FileRow, IdempotencyRow
from tests.job_store.conftest import HASH, RECIPE, job_request

SECRET = "mp_made_before_owners"
REQUEST = {"kind": "compress", "request": job_request().model_dump(mode="json")}
FINGERPRINT = hashlib.sha256(json.dumps(REQUEST, sort_keys=True).encode()).hexdigest()
JOB = {
    "id": "job-old", "created_at": 1.0, "status": "queued", "kind": "compress", "model": "m", "recipe": RECIPE,
    "recipe_hash": HASH, "job_metadata": {}, "progress": {}, "usage": {}, "fence": 0, "lease_until": 0.0, "attempt": 0,
    "enqueued_at": 1.0, "next_sequence": 2,
}  # fmt: skip
RELEASED = {
    "0001": {
        "files": {"id": "file-old", "created_at": 1.0, "filename": "a", "purpose": "model", "bytes": 1, "sha256": HASH},
        "uploads": {
            "id": "upload_old", "created_at": 1.0, "expires_at": 9e9, "filename": "a", "purpose": "model", "bytes": 1,
            "status": "pending",
        },
        "models": {"id": "m", "created_at": 1.0, "status": "ready", "origin": "path", "path": "/m", "request": {}},
        "jobs": JOB,
        "events": {
            "job_id": "job-old", "sequence": 1, "created_at": 1.0, "level": "info", "message": "made",
            "type": "message", "data": {},
        },
        "idempotency_keys": {"key": "again", "created_at": 1.0, "fingerprint": FINGERPRINT, "job_id": "job-old"},
        "api_keys": {
            "id": "key_old", "created_at": 1.0, "name": "old", "digest": hashlib.sha256(SECRET.encode()).hexdigest(),
        },
    }
}  # fmt: skip


def _fill(engine: Engine, revision: str) -> None:
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for name, row in RELEASED[revision].items():
            connection.execute(tables.tables[name].insert(), row)


@pytest.mark.parametrize("revision", RELEASED)
def test_a_released_schema_with_data_becomes_the_present_one(database_url: str, revision: str) -> None:
    engine = make_engine(database_url)
    upgrade(engine, revision)
    _fill(engine, revision)
    upgrade(engine)

    with engine.connect() as connection:
        for name, row in RELEASED[revision].items():
            keys = [column.name for column in Base.metadata.tables[name].primary_key if column.name in row]
            where = " AND ".join(f"{key} = :{key}" for key in keys)
            found = connection.execute(text(f"SELECT * FROM {name} WHERE {where}"), row).mappings().one()  # noqa: S608
            assert found.get("owned_by", DEFAULT_OWNER) == DEFAULT_OWNER
            assert all(found[key] == value for key, value in row.items() if isinstance(value, str | int | float))

    key = KeyStore(engine).recognise(SECRET)
    assert key is not None
    assert (key.owner, key.scopes) == (DEFAULT_OWNER, ("admin",))
    jobs = JobStore(engine)
    assert jobs.create(job_request(), recipe_hash=HASH, idempotency_key="again")[0].id == "job-old"
    with pytest.raises(IdempotencyKeyReused):
        jobs.create(job_request(suffix="x"), recipe_hash=HASH, idempotency_key="again")
    engine.dispose()


def test_an_older_process_may_go_on_writing(database_url: str) -> None:
    """While servers are replaced one by one, the old ones know no owners."""
    engine = make_engine(database_url)
    upgrade(engine)
    _fill(engine, "0001")
    with reading(engine) as session:
        assert session.get_one(IdempotencyRow, (DEFAULT_OWNER, "again")).job_id == "job-old"
        assert session.get_one(FileRow, "file-old").owned_by == DEFAULT_OWNER
    with writing(engine) as session:
        session.add(FileRow(id="n", created_at=2.0, filename="b", purpose="model", bytes=1, sha256="1" * 64))
    assert len(FileStore(engine, Layout(None)).list(after=None, limit=9).data) == 2  # type: ignore[arg-type]
    engine.dispose()
