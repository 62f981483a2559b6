"""The reaper over a real Redis: lost messages, silent workers, a broker that is away."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from api_schemas.errors import Unavailable
from job_store.database import writing
from job_store.jobs import JobStore
from job_store.leases import LeaseStore
from job_store.queue import depth, enqueue
from job_store.reaper import Reaper
from job_store.settings import Settings
from job_store.tables import JobRow, ModelRow
from tests.job_store.conftest import HASH, job_request
from tests.servers import Redis, redis_server, wait_until


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with redis_server() as redis:
        yield redis


@pytest.fixture(params=["redis", "filesystem"])
def broker_url(request: pytest.FixtureRequest, redis: Redis, tmp_path: Path) -> str:
    if request.param == "filesystem":
        return f"filesystem://{tmp_path / 'broker'}"
    import redis as client

    with client.Redis.from_url(redis.url) as connection:
        connection.flushall()
    return redis.url


@pytest.fixture
def settings(tmp_path: Path, broker_url: str) -> Settings:
    return Settings(home=tmp_path / "home", broker_url=broker_url, reaper_seconds=0.1, lease_seconds=60.0)


def waiting(settings: Settings, kind: str = "compress") -> int:
    return depth(kind, broker_url=settings.broker_url)


def create(engine: Engine) -> str:
    return JobStore(engine).create(job_request(), recipe_hash=HASH)[0].id


def age(engine: Engine, job_id: str, **values: float) -> None:
    """Put a job's times into the past."""
    with writing(engine) as session:
        row = session.get_one(JobRow, job_id)
        for name, value in values.items():
            setattr(row, name, value)


def test_a_queued_job_without_a_message_is_sent_again(engine: Engine, settings: Settings) -> None:
    job_id = create(engine)
    reaper = Reaper(engine, settings)
    reaper.repair()
    assert waiting(settings) == 0  # its message may be on the way
    age(engine, job_id, enqueued_at=0.0)
    reaper.repair()
    assert waiting(settings) == 1
    age(engine, job_id, enqueued_at=0.0)
    reaper.repair()
    assert waiting(settings) == 1  # there is a message: none is piled on it


def test_a_job_of_a_silent_worker_is_sent_to_another(engine: Engine, settings: Settings) -> None:
    job_id = create(engine)
    LeaseStore(engine, max_attempts=3).claim(job_id, "w", -1.0)
    Reaper(engine, settings).repair()
    assert JobStore(engine).get(job_id).status == "queued"
    assert waiting(settings) == 1


def test_an_unfinished_download_is_sent_again(engine: Engine, settings: Settings) -> None:
    with writing(engine) as session:
        session.add(ModelRow(id="m", created_at=0.0, status="downloading", origin="hub", path="", request={}))
    reaper = Reaper(engine, settings)
    for _ in range(2):
        reaper.repair()
    assert (waiting(settings, "fetch_model"), waiting(settings)) == (1, 0)


def test_the_thread_repairs_and_stops(engine: Engine, settings: Settings) -> None:
    job_id = create(engine)
    age(engine, job_id, enqueued_at=0.0)
    reaper = Reaper(engine, settings)
    reaper.start()
    wait_until(lambda: waiting(settings) == 1)
    reaper.stop()
    assert not reaper.is_alive()


def test_a_broker_that_is_away_is_named_and_waited_for(engine: Engine, tmp_path: Path) -> None:
    job_id = create(engine)
    age(engine, job_id, enqueued_at=0.0)
    with redis_server() as redis:
        settings = Settings(home=tmp_path / "home", broker_url=redis.url, reaper_seconds=0.1)
        redis.kill()
        with pytest.raises(Unavailable) as caught:
            enqueue(job_id, "compress", broker_url=redis.url)
        assert caught.value.code == "broker_unreachable"
        assert redis.url.rpartition("@")[0].rpartition(":")[2] not in caught.value.message  # no password
        reaper = Reaper(engine, settings)
        reaper.start()
        wait_until(lambda: reaper.failures >= 1)
        redis.start()
        wait_until(lambda: waiting(settings) == 1)
        reaper.stop()


def test_no_broker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEPRESS_BROKER_URL", raising=False)
    with pytest.raises(Unavailable) as caught:
        enqueue("job-x", "compress")
    assert caught.value.code == "no_broker"
