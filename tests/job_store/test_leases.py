"""Claims, fences, endings: whatever happens, one worker holds a job and only its holder writes."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from api_schemas.errors import Conflict, ErrorBody, NotFound
from api_schemas.events import ProgressEvent
from api_schemas.jobs import Usage
from job_store.database import make_engine, reading, writing
from job_store.jobs import JobStore
from job_store.leases import Ending, LeaseStore
from job_store.owners import Viewer
from job_store.tables import Base, JobRow, ModelRow
from job_store.transitions import ALLOWED, IllegalTransition, advance
from tests.job_store.conftest import HASH, Clock, job_request

LEASE = 90.0
ERROR = ErrorBody(message="m", type="job_error", param=None, code="job_process_killed")
DONE = Ending("succeeded", "Job succeeded", Usage(seconds=1.0), report={"files": {"b": "2", "a": "1"}})


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock=clock)


@pytest.fixture
def leases(engine: Engine, clock: Clock) -> LeaseStore:
    return LeaseStore(engine, max_attempts=3, clock=clock)


@pytest.fixture
def job_id(store: JobStore) -> str:
    return store.create(job_request(suffix="s"), recipe_hash=HASH)[0].id


def progress(percent: float, block: int | None = None) -> ProgressEvent:
    return ProgressEvent(message="block done", stage="compressing", block=block, blocks_total=6, percent=percent)


def artifact(job_id: str, name: str = "tiny-s-1") -> ModelRow:
    return ModelRow(
        id=name, created_at=0.0, status="ready", origin="job", path="/p", parent="tiny", job=job_id, request={}
    )


def test_a_claim_carries_what_a_worker_needs(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    claim = leases.claim(job_id, "w", LEASE)
    assert claim is not None
    assert (claim.fence, claim.attempt, claim.model, claim.suffix) == (1, 1, "tiny", "s")
    job = store.get(job_id)
    assert (job.status, job.attempt, job.started_at) == ("running", 1, 1_000_000)


def test_a_held_an_unknown_and_an_ended_job_are_not_to_be_had(leases: LeaseStore, job_id: str) -> None:
    assert leases.claim("job-none", "w", LEASE) is None
    leases.claim(job_id, "w", LEASE)
    assert leases.claim(job_id, "v", LEASE) is None
    assert leases.finish(job_id, 1, DONE)
    assert leases.claim(job_id, "v", LEASE) is None


def test_an_artifact_belongs_to_the_owner_of_its_job(engine: Engine, leases: LeaseStore) -> None:
    anna = JobStore(engine, viewer=Viewer("anna"))
    job_id = anna.create(job_request(), recipe_hash=HASH)[0].id
    assert leases.claim(job_id, "w", LEASE) is not None
    assert leases.finish(job_id, 1, Ending("succeeded", "m", Usage(), report=DONE.report, artifact=artifact(job_id)))
    with reading(engine) as session:
        assert session.get_one(ModelRow, "tiny-s-1").owned_by == "anna"
    with pytest.raises(NotFound):
        JobStore(engine, viewer=Viewer("bert")).get(job_id)


def test_many_threads_one_winner(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    with ThreadPoolExecutor(12) as pool:
        claims = list(pool.map(lambda index: leases.claim(job_id, str(index), LEASE), range(24)))
    assert sum(claim is not None for claim in claims) == 1
    assert store.get(job_id).attempt == 1


def _claim_in_process(url: str, job_id: str, name: str) -> bool:
    engine = make_engine(url)
    claim = LeaseStore(engine, max_attempts=3).claim(job_id, name, LEASE)
    engine.dispose()
    return claim is not None


def test_many_processes_one_winner(engine: Engine, database_url: str, job_id: str) -> None:
    engine.dispose()
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.starmap(_claim_in_process, [(database_url, job_id, str(index)) for index in range(8)])
    assert sum(won) == 1


def test_an_expired_lease_is_taken_over_and_the_old_holder_fenced_off(
    leases: LeaseStore, store: JobStore, clock: Clock, job_id: str
) -> None:
    leases.claim(job_id, "old", LEASE)
    clock.now += LEASE + 1
    claim = leases.claim(job_id, "new", LEASE)
    assert claim is not None
    assert (claim.fence, claim.attempt) == (2, 2)
    published: list[bool] = []
    assert leases.renew(job_id, 1, LEASE) is None
    assert leases.standing(job_id, 1) is None
    assert not leases.record(job_id, 1, progress(10))
    assert not leases.finish(job_id, 1, DONE, publish=lambda: published.append(True))
    assert leases.release(job_id, 1, "died", error=ERROR) is None
    assert published == []
    assert store.get(job_id).status == "running"
    assert leases.renew(job_id, 2, LEASE) == "running"


def test_renewal_keeps_the_lease(leases: LeaseStore, clock: Clock, job_id: str) -> None:
    leases.claim(job_id, "w", LEASE)
    for _ in range(5):
        clock.now += LEASE - 1
        assert leases.renew(job_id, 1, LEASE) == "running"
        assert leases.reap() == []


def test_progress_event_and_estimate_come_together(
    leases: LeaseStore, store: JobStore, clock: Clock, job_id: str
) -> None:
    leases.claim(job_id, "w", LEASE)
    clock.now += 10
    assert leases.record(job_id, 1, progress(25.0, block=1), usage=Usage(seconds=10.0, peak_rss_bytes=5))
    job = store.get(job_id)
    assert (job.progress.stage, job.progress.block, job.progress.blocks_total) == ("compressing", 1, 6)
    assert (job.progress.percent, job.usage.peak_rss_bytes) == (25.0, 5)
    assert job.estimated_finish == 1_000_040  # a quarter took 10 s
    last = store.events(job_id, after=0, limit=10).data[-1]
    assert (last.message, last.type) == ("block done", "message")


def test_an_event_with_data_is_metrics_and_a_long_message_is_cut(
    leases: LeaseStore, store: JobStore, job_id: str
) -> None:
    leases.claim(job_id, "w", LEASE)
    event = ProgressEvent(message="x" * 9000, stage="evaluating", percent=99.0, data={"perplexity": 7.5})
    leases.record(job_id, 1, event)
    last = store.events(job_id, after=0, limit=10).data[-1]
    progress = {"stage": "evaluating", "block": None, "blocks_total": None, "percent": 99.0}
    assert (last.type, last.data, len(last.message)) == ("metrics", {**progress, "perplexity": 7.5}, 4096)


def test_finishing_is_one_transaction_with_the_artifact(
    engine: Engine, leases: LeaseStore, store: JobStore, job_id: str
) -> None:
    leases.claim(job_id, "w", LEASE)
    ending = Ending("succeeded", "Job succeeded", Usage(seconds=2.0), report=DONE.report, artifact=artifact(job_id))
    assert leases.finish(job_id, 1, ending)
    job = store.get(job_id)
    assert (job.status, job.compressed_model, job.progress.percent) == ("succeeded", "tiny-s-1", 100.0)
    assert job.result_files == ("a", "b")
    assert job.estimated_finish is None
    assert store.report(job_id) == DONE.report
    with reading(engine) as session:
        assert session.get_one(ModelRow, "tiny-s-1").parent == "tiny"


def test_a_failed_publication_writes_nothing(engine: Engine, leases: LeaseStore, store: JobStore, job_id: str) -> None:
    leases.claim(job_id, "w", LEASE)

    def publish() -> None:
        raise OSError("rename failed")

    ending = Ending("succeeded", "Job succeeded", Usage(), artifact=artifact(job_id))
    with pytest.raises(OSError, match="rename failed"):
        leases.finish(job_id, 1, ending, publish=publish)
    assert store.get(job_id).status == "running"
    with reading(engine) as session:
        assert session.get(ModelRow, "tiny-s-1") is None
    assert leases.finish(job_id, 1, ending)


def test_a_model_of_somebody_else_is_never_replaced(engine: Engine, leases: LeaseStore, job_id: str) -> None:
    with writing(engine) as session:
        session.add(artifact("job-other"))
    leases.claim(job_id, "w", LEASE)
    published: list[bool] = []
    with pytest.raises(Conflict) as caught:
        leases.finish(
            job_id,
            1,
            Ending("succeeded", "m", Usage(), artifact=artifact(job_id)),
            publish=lambda: published.append(True),
        )
    assert (caught.value.code, published) == ("model_exists", [])


def test_a_dead_process_is_retried_until_attempts_are_used_up(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    for attempt in (1, 2):
        leases.claim(job_id, "w", LEASE)
        assert leases.release(job_id, attempt, "killed by SIGKILL", error=ERROR) == "queued"
        assert "killed by SIGKILL" in store.events(job_id, after=0, limit=99).data[-1].message
    leases.claim(job_id, "w", LEASE)
    assert leases.release(job_id, 3, "killed by SIGKILL", error=ERROR) == "failed"
    job = store.get(job_id)
    assert job.error is not None
    assert (job.error.code, job.attempt) == ("job_process_killed", 3)


def test_a_worker_that_is_told_to_stop_costs_no_attempt(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    for fence in range(1, 6):
        leases.claim(job_id, "w", LEASE)
        assert leases.release(job_id, fence, "shutdown", error=ERROR, counted=False) == "queued"
    assert store.get(job_id).attempt == 0


def test_cancel_of_a_running_job_reaches_its_holder(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    leases.claim(job_id, "w", LEASE)
    assert store.request_cancel(job_id).status == "cancelling"
    assert store.request_cancel(job_id).status == "cancelling"
    assert leases.standing(job_id, 1) == "cancelling"
    assert leases.renew(job_id, 1, LEASE) == "cancelling"
    assert leases.finish(job_id, 1, Ending("cancelled", "Job cancelled", Usage()))
    assert store.get(job_id).status == "cancelled"


def test_a_cancelling_job_whose_process_dies_is_cancelled(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    leases.claim(job_id, "w", LEASE)
    store.request_cancel(job_id)
    assert leases.release(job_id, 1, "died", error=ERROR) == "cancelled"


def test_the_reaper_requeues_and_then_gives_up(leases: LeaseStore, store: JobStore, clock: Clock, job_id: str) -> None:
    for _ in range(2):
        leases.claim(job_id, "w", LEASE)
        assert leases.reap() == []
        clock.now += LEASE + 1
        assert leases.reap() == [job_id]
        assert leases.reap() == []
    leases.claim(job_id, "w", LEASE)
    clock.now += LEASE + 1
    assert leases.claim(job_id, "v", LEASE) is None  # its attempts are used up
    assert leases.reap() == []
    job = store.get(job_id)
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "worker_lost")


def test_the_reaper_ends_a_cancelling_job_of_a_dead_worker(
    leases: LeaseStore, store: JobStore, clock: Clock, job_id: str
) -> None:
    leases.claim(job_id, "w", LEASE)
    store.request_cancel(job_id)
    clock.now += LEASE + 1
    assert leases.reap() == []
    assert store.get(job_id).status == "cancelled"


def test_overdue_jobs_are_sent_again_once_per_period(leases: LeaseStore, clock: Clock, job_id: str) -> None:
    assert leases.overdue(60) == []
    clock.now += 61
    assert leases.overdue(60) == [job_id]
    assert leases.overdue(60) == []


def test_sequence_numbers_have_no_gaps_under_contention(leases: LeaseStore, store: JobStore, job_id: str) -> None:
    leases.claim(job_id, "w", LEASE)
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda index: leases.record(job_id, 1, progress(float(index))), range(40)))
    events = store.events(job_id, after=0, limit=100).data
    assert [event.sequence for event in events] == list(range(1, 43))


@pytest.mark.parametrize("current", sorted(ALLOWED))
@pytest.mark.parametrize("to", sorted(ALLOWED))
def test_only_allowed_steps_are_taken(current: str, to: str) -> None:
    row = JobRow(id="job-x", status=current, next_sequence=1, owned_by="anna")
    engine = make_engine("sqlite://")
    Base.metadata.create_all(engine)
    with reading(engine) as session:
        if to in ALLOWED[current]:
            advance(session, row, to, 1.0, "m")
            assert row.status == to
        else:
            with pytest.raises(IllegalTransition, match=f"from {current} to {to}"):
                advance(session, row, to, 1.0, "m")
        session.rollback()


def test_the_rate_of_the_last_success_is_what_plans_estimate_with(
    leases: LeaseStore, store: JobStore, clock: Clock
) -> None:
    assert store.flops_per_second() is None
    runs = [
        (4e9, "succeeded", None),
        (6e9, "succeeded", None),
        (9e9, "failed", None),
        (8e9, "succeeded", {"chosen": 0}),
    ]
    for flops, status, search in runs:  # a search's plan is an upper bound: no rate follows from it
        clock.now += 1
        job_id = store.create(job_request(), recipe_hash=HASH)[0].id
        leases.claim(job_id, "w", LEASE)
        report = {"plan": {"flops": flops}, "seconds": 2.0, "files": {}, "search": search}
        ending = Ending(status, "m", Usage(), report=report, error=None if status == "succeeded" else ERROR)
        assert leases.finish(job_id, 1, ending)
    assert store.flops_per_second() == 3e9
