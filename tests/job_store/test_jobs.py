"""Jobs as clients see them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.jobs import Job
from job_store.jobs import IdempotencyKeyReused, JobStore
from tests.job_store.conftest import HASH, Clock, job_request


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock=clock)


def create(store: JobStore, **changes: object) -> Job:
    return store.create(job_request(**changes), recipe_hash=HASH)[0]


def test_a_new_job_is_queued_and_complete(store: JobStore) -> None:
    job, created = store.create(job_request(metadata={"team": "a"}), recipe_hash=HASH)
    assert created
    assert (job.status, job.attempt, job.progress.percent, job.error) == ("queued", 0, 0.0, None)
    assert (job.created_at, job.started_at, job.metadata, job.recipe_hash) == (1_000_000, None, {"team": "a"}, HASH)
    assert store.get(job.id) == job


def test_an_unknown_job_is_named(store: JobStore) -> None:
    for job_id in ("job-none", "nul\0"):
        with pytest.raises(NotFound) as caught:
            store.get(job_id)
        assert (caught.value.code, caught.value.param) == ("job_not_found", "job_id")


def test_the_same_key_and_payload_answer_the_same_job(store: JobStore) -> None:
    first, _ = store.create(job_request(), recipe_hash=HASH, idempotency_key="k")
    again, created = store.create(job_request(), recipe_hash=HASH, idempotency_key="k")
    assert (again.id, created) == (first.id, False)


def test_the_same_key_with_another_payload_is_refused(store: JobStore) -> None:
    store.create(job_request(), recipe_hash=HASH, idempotency_key="k")
    with pytest.raises(IdempotencyKeyReused) as caught:
        store.create(job_request(suffix="other"), recipe_hash=HASH, idempotency_key="k")
    assert (caught.value.code, caught.value.status) == ("idempotency_key_reused", 422)


def test_one_job_however_many_ask_with_one_key_at_once(store: JobStore) -> None:
    def ask(_: int) -> tuple[str, bool]:
        job, created = store.create(job_request(), recipe_hash=HASH, idempotency_key="k")
        return job.id, created

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1


def test_pages_go_from_the_newest_to_the_oldest(store: JobStore, clock: Clock) -> None:
    made = []
    for index in range(7):
        clock.now += index // 3  # some share an instant
        made.append(create(store).id)
    seen: list[str] = []
    after = None
    while True:
        page = store.list(after=after, limit=3, metadata={})
        seen += [job.id for job in page.data]
        assert (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)
        if not page.has_more:
            break
        after = page.last_id
    assert sorted(seen) == sorted(made)
    ages = [store.get(job_id).created_at for job_id in seen]
    assert ages == sorted(ages, reverse=True)


def test_an_empty_page_and_an_unknown_cursor(store: JobStore) -> None:
    page = store.list(after=None, limit=5, metadata={})
    assert (page.data, page.has_more, page.first_id, page.last_id) == ([], False, None, None)
    with pytest.raises(NotFound) as caught:
        store.list(after="job-none", limit=5, metadata={})
    assert caught.value.param == "after"


@pytest.mark.parametrize("key", ["team", 'quo"te', "dot.ted", "$[0]", "käse", "%"])
def test_jobs_are_found_by_metadata(store: JobStore, key: str) -> None:
    wanted = create(store, metadata={key: "a", "year": "2024"})
    create(store, metadata={key: "b", "year": "2024"})
    create(store)
    assert [job.id for job in store.list(after=None, limit=5, metadata={key: "a"}).data] == [wanted.id]
    assert len(store.list(after=None, limit=5, metadata={"year": "2024"}).data) == 2
    assert store.list(after=None, limit=5, metadata={key: "a", "year": "2023"}).data == []


def test_a_nul_in_metadata_is_refused(store: JobStore) -> None:
    with pytest.raises(InvalidRequest) as caught:
        create(store, metadata={"a": "nul\0"})
    assert (caught.value.code, caught.value.param) == ("invalid_metadata", "metadata")
    with pytest.raises(InvalidRequest):
        store.list(after=None, limit=5, metadata={"nul\0": "a"})


def test_cancel_of_a_queued_job_is_at_once_and_only_once(store: JobStore, clock: Clock) -> None:
    job = create(store)
    clock.now += 5
    cancelled = store.request_cancel(job.id)
    assert (cancelled.status, cancelled.finished_at) == ("cancelled", 1_000_005)
    with pytest.raises(Conflict) as caught:
        store.request_cancel(job.id)
    assert caught.value.code == "job_not_cancellable"


def test_events_are_numbered_and_paged(store: JobStore) -> None:
    job = create(store)
    store.request_cancel(job.id)
    first = store.events(job.id, after=0, limit=1)
    assert [event.sequence for event in first.data] == [1]
    assert first.has_more
    rest = store.events(job.id, after=1, limit=10)
    assert [(event.sequence, event.level) for event in rest.data] == [(2, "info")]
    assert not rest.has_more
    with pytest.raises(NotFound):
        store.events("job-none", after=0, limit=1)


def test_no_report_before_there_is_one(store: JobStore) -> None:
    job = create(store)
    with pytest.raises(NotFound) as caught:
        store.report(job.id)
    assert caught.value.code == "report_not_ready"
