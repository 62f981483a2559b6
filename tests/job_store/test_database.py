"""The schema's version, transactions, and many callers at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from api_schemas.keys import DEFAULT_OWNER
from job_store.database import make_engine, reading, upgrade, writing
from job_store.tables import Base, IdempotencyRow


def test_migrations_build_exactly_the_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert differences == []


def test_upgrade_by_many_at_once_and_again(database_url: str) -> None:
    engines = [make_engine(database_url) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(upgrade, engines))
    upgrade(engines[0])
    assert {"jobs", "events", "models", "alembic_version"} <= set(inspect(engines[0]).get_table_names())
    for engine in engines:
        engine.dispose()


def test_a_failed_transaction_leaves_nothing(engine: Engine) -> None:
    def fail_halfway() -> None:
        with writing(engine) as session:
            session.add(IdempotencyRow(key="k", created_at=0.0, fingerprint="f", job_id=None))
            session.flush()
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    with reading(engine) as session:
        assert session.get(IdempotencyRow, (DEFAULT_OWNER, "k")) is None


def test_writers_do_not_trip_over_each_other(engine: Engine) -> None:
    def add(index: int) -> None:
        with writing(engine) as session:
            session.execute(text("SELECT count(*) FROM jobs")).scalar_one()  # a read first, then a write
            session.add(IdempotencyRow(key=str(index), created_at=0.0, fingerprint="f", job_id=None))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    with reading(engine) as session:
        assert session.execute(text("SELECT count(*) FROM idempotency_keys")).scalar_one() == 40


def test_sqlite_is_durable_and_keeps_foreign_keys(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'deep' / 'modepress.db'}")
    with engine.connect() as connection:
        values = {name: connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in PRAGMAS}
    assert values == PRAGMAS
    engine.dispose()


PRAGMAS = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 30000}
