"""Servers that many tests share."""

import os
from collections.abc import Iterator

import pytest

from tests import servers

# Workers of tests that are about something else start without looking at themselves; tests of the check say otherwise.
os.environ.setdefault("MODEPRESS_SELF_CHECK", "skip")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a PostgreSQL server that lives as long as the test run."""
    with servers.postgres_server() as url:
        yield url


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database."""
    with servers.postgres_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a Redis server that lives as long as the test run; tests that kill it start their own."""
    with servers.redis_server() as redis:
        yield redis.url
