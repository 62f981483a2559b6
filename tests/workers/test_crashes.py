"""Whatever is killed, at whatever block: the job ends well, with the undisturbed run's artifact, byte for byte."""

import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from job_store.queue import depth, enqueue
from tests.servers import wait_until
from tests.tiny_models import RUINOUS_STEP, make_tiny_model, teach
from tests.workers.live import BLOCKS, Live, add_model, live_service

pytestmark = pytest.mark.servers
Artifact = dict[str, str]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    model = make_tiny_model(folder / "model", layers=BLOCKS, hidden=128, intermediate=512)
    with live_service(folder, model) as live:
        yield live


@pytest.fixture(scope="module")
def undisturbed(live: Live) -> Artifact:
    job = live.ended(live.submit())
    assert job.attempt == 1
    return live.artifact(job)


def random_block(seed: int) -> int:
    return random.Random(seed).randrange(1, BLOCKS)  # noqa: S311 (no secret)


def assert_clean(live: Live, job_id: str) -> None:
    """Nothing of an ended job is left but its description and its log."""
    names = wait_until(lambda: _names(live, job_id) <= {"job.json", "log.txt", "trace"}, what="the sweep")
    assert names


def _names(live: Live, job_id: str) -> set[str]:
    return {path.name for path in live.place.layout.job(job_id).iterdir()}


def test_the_job_process_is_killed(live: Live, undisturbed: Artifact) -> None:
    job_id = live.submit()
    live.until_block(job_id, random_block(1))
    (process,) = live.worker.job_processes()
    process.kill()
    job = live.ended(job_id)
    assert (live.artifact(job), job.attempt) == (undisturbed, 2)
    assert any("SIGKILL" in message for message in live.messages(job_id))
    assert_clean(live, job_id)


def test_the_worker_is_killed(live: Live, undisturbed: Artifact) -> None:
    job_id = live.submit()
    live.until_block(job_id, random_block(2))
    below = live.worker.descendants()
    assert live.worker.job_processes()
    live.worker.kill()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []  # the job process went with its supervisor
    live.worker.start()
    job = live.ended(job_id)
    assert (live.artifact(job), job.attempt) == (undisturbed, 2)
    assert any("went silent" in message for message in live.messages(job_id))
    assert_clean(live, job_id)


def test_the_supervisor_alone_is_killed(live: Live, undisturbed: Artifact) -> None:
    job_id = live.submit()
    live.until_block(job_id, random_block(4))
    (process,) = live.worker.job_processes()
    supervisor = process.parent()
    assert supervisor is not None
    supervisor.kill()  # the main process gives the message to a new pool process, which finds the lease still held
    job = live.ended(job_id)
    assert (live.artifact(job), job.attempt) == (undisturbed, 2)
    assert_clean(live, job_id)


def test_the_worker_is_killed_on_postgresql(
    live: Live, undisturbed: Artifact, tmp_path: Path, postgres_database: str
) -> None:
    model = Path(live.place.layout.home).parent / "model"
    with live_service(tmp_path, model, database_url=postgres_database) as production:
        job_id = production.submit()
        production.until_block(job_id, random_block(5))
        production.worker.kill()
        production.worker.start()
        job = production.ended(job_id)
        assert (production.artifact(job), job.attempt) == (undisturbed, 2)
        assert_clean(production, job_id)


def test_redis_is_killed_and_comes_back(live: Live, undisturbed: Artifact) -> None:
    running, waiting = live.submit(), live.submit()
    live.until_block(running, random_block(3))
    live.redis.kill()
    wait_until(lambda: "measuring before and after" in live.messages(running), seconds=120, what="work without Redis")
    live.redis.start()
    for job_id in (running, waiting):
        assert live.artifact(live.ended(job_id)) == undisturbed
        assert_clean(live, job_id)


def test_a_lost_message_is_sent_again(live: Live, undisturbed: Artifact) -> None:
    live.worker.stop()
    job_id = live.submit()
    _forget_messages(live)
    live.worker.start()
    assert live.artifact(live.ended(job_id)) == undisturbed


def test_duplicate_deliveries_are_turned_away(live: Live, undisturbed: Artifact) -> None:
    job_id = live.submit()
    for _ in range(3):
        enqueue(job_id, "compress", broker_url=live.redis.url)
    job = live.ended(job_id)
    assert (live.artifact(job), job.attempt) == (undisturbed, 1)
    wait_until(lambda: depth("compress", broker_url=live.redis.url) == 0, what="an empty queue")
    assert live.jobs.get(job_id) == job


def test_cancel_while_blocks_are_being_solved(live: Live) -> None:
    job_id = live.submit()
    live.until_block(job_id, 1)
    assert live.jobs.request_cancel(job_id).status == "cancelling"
    job = wait_until(lambda: live.jobs.get(job_id).status == "cancelled" and live.jobs.get(job_id), seconds=10)
    assert (job.compressed_model, job.error) == (None, None)
    assert_clean(live, job_id)
    assert not any(job_id[4:10] in path.name for path in (live.place.layout.home / "models").iterdir())


def test_a_worker_that_is_told_to_stop_gives_its_job_back(live: Live, undisturbed: Artifact) -> None:
    job_id = live.submit()
    live.until_block(job_id, 2)
    assert live.worker.stop() == 0
    assert live.jobs.get(job_id).status == "queued"
    live.worker.start()
    job = live.ended(job_id)
    assert (live.artifact(job), job.attempt) == (undisturbed, 1)


def _forget_messages(live: Live) -> None:
    import redis

    with redis.Redis.from_url(live.redis.url) as client:
        assert client.delete("compress") == 1


def test_a_failed_gate_keeps_report_and_artifact(live: Live, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "taught")
    teach(folder)
    add_model(live.place, "taught", folder)
    job = live.ended(live.submit("taught", steps=[RUINOUS_STEP], gate={"perplexity_increase": 0.02}))
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "quality_gate")
    assert job.compressed_model is not None
    assert live.jobs.report(job.id)["gate_passed"] is False
    assert Path(live.place.layout.model(job.compressed_model) / "config.json").exists()
