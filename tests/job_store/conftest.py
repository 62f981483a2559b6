"""Every test of the job store runs on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from api_schemas.jobs import JobRequest
from job_store.database import make_engine, upgrade

RECIPE = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}
HASH = "0" * 64


class Clock:
    """A clock that tests move by hand. Calling it tells the time."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'modepress.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    upgrade(engine)
    yield engine
    engine.dispose()


def job_request(**changes: object) -> JobRequest:
    """A valid request, with some fields changed."""
    return JobRequest.model_validate({"model": "tiny", "recipe": RECIPE, **changes})
