"""What owners may have: bytes, jobs and tokens, counted on SQLite and PostgreSQL, also by many at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from api_schemas.errors import InvalidRequest, NotPermitted, TooManyRequests
from api_schemas.quotas import Quota
from job_store.database import writing
from job_store.jobs import JobStore
from job_store.owners import Viewer
from job_store.quotas import QuotaStore, admit_bytes, parse_limit
from job_store.tables import FileRow, ModelRow, UploadRow
from tests.job_store.conftest import HASH, Clock, job_request

DAY = 86400
ANNA = Viewer("anna", quota=Quota())


@pytest.fixture
def quotas(engine: Engine, clock: Clock) -> QuotaStore:
    return QuotaStore(engine, Quota(jobs=2), clock=clock)


def _file(name: str, size: int, owner: str = "anna") -> FileRow:
    made = {"created_at": 0.0, "filename": "a", "purpose": "model", "sha256": name.rjust(64, "0")}
    return FileRow(id=name, bytes=size, owned_by=owner, **made)


def _model(name: str, origin: str, size: int, files: tuple[str, ...] = ()) -> ModelRow:
    request = {"files": [{"file_id": file, "path": file} for file in files]}
    made = {"created_at": 0.0, "status": "ready", "path": "/p", "owned_by": "anna"}
    return ModelRow(id=name, origin=origin, facts={"bytes": size}, request=request, **made)


def test_what_counts_as_bytes(engine: Engine, quotas: QuotaStore) -> None:
    """Files, uploads under way, artifacts; not the user's folders, and a model of uploads only when these are gone."""
    upload = {"created_at": 0.0, "expires_at": 9e9, "filename": "a", "purpose": "model", "owned_by": "anna"}
    with writing(engine) as session:
        session.add_all([_file("f1", 1), _file("f2", 20), _file("other", 10**6, owner="bert")])
        session.add(UploadRow(id="u1", bytes=300, status="pending", **upload))
        session.add(UploadRow(id="u2", bytes=10**6, status="completed", **upload))
        session.add_all([_model("m1", "path", 10**6), _model("m2", "job", 4000), _model("m3", "hub", 50_000)])
        session.add_all([_model("m4", "upload", 21, ("f1", "f2")), _model("m5", "upload", 600_000, ("f1", "gone"))])
    assert quotas.state("anna").used.bytes == 1 + 20 + 300 + 4000 + 50_000 + 600_000


def test_bytes_up_to_the_limit_and_not_one_more(engine: Engine, quotas: QuotaStore) -> None:
    quotas.set("anna", Quota(bytes=100))
    with writing(engine) as session:
        session.add(_file("f1", 60))
        session.flush()
        admit_bytes(session, ANNA, 40, "bytes")
        with pytest.raises(
            NotPermitted, match=r"bytes: 41 bytes more do not fit: owner 'anna' uses 60 of 100"
        ) as caught:
            admit_bytes(session, ANNA, 41, "bytes")
        admit_bytes(session, Viewer("bert", quota=Quota()), 10**12, "bytes")
        admit_bytes(session, Viewer("anna"), 10**12, "bytes")  # the server's own work
    assert (caught.value.code, caught.value.param) == ("byte_quota_exceeded", "bytes")


def test_jobs_at_a_time_also_when_many_are_sent_at_once(engine: Engine, quotas: QuotaStore) -> None:
    jobs = JobStore(engine, viewer=Viewer("anna", quota=Quota(jobs=2)))

    refusals = []

    def send(_: int) -> str | None:
        try:
            return jobs.create(job_request(), recipe_hash=HASH)[0].id
        except TooManyRequests as error:
            refusals.append((error.code, error.retry_after))
            return None

    with ThreadPoolExecutor(6) as pool:
        made = [job for job in pool.map(send, range(12)) if job]
    assert len(made) == 2
    assert refusals == [("job_quota_exceeded", 60.0)] * 10
    assert quotas.state("anna").used.jobs == 2
    jobs.request_cancel(made[0])
    assert send(0) is not None
    assert JobStore(engine, viewer=Viewer("bert", quota=Quota(jobs=2))).create(job_request(), recipe_hash=HASH)[1]


def test_a_replay_is_no_further_job(engine: Engine) -> None:
    jobs = JobStore(engine, viewer=Viewer("anna", quota=Quota(jobs=1)))
    first = jobs.create(job_request(), recipe_hash=HASH, idempotency_key="k")[0].id
    assert jobs.create(job_request(), recipe_hash=HASH, idempotency_key="k")[0].id == first


def test_an_artifact_that_cannot_be_kept_is_not_begun(engine: Engine) -> None:
    jobs = JobStore(engine, viewer=Viewer("anna", quota=Quota(bytes=99)))
    with pytest.raises(NotPermitted, match="100 bytes more") as caught:
        jobs.create(job_request(), recipe_hash=HASH, artifact_bytes=100)
    assert caught.value.param == "recipe"
    assert jobs.list(after=None, limit=9, metadata={}).data == []


def test_tokens_of_a_day(quotas: QuotaStore, clock: Clock) -> None:
    quotas.set("anna", Quota(tokens=100))
    clock.now = 10.0 * DAY + 80_000
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: quotas.count_tokens("anna", 9), range(11)))
    quotas.require_tokens("anna")
    quotas.count_tokens("anna", 1)
    with pytest.raises(TooManyRequests, match="100 of 100 tokens today") as caught:
        quotas.require_tokens("anna")
    assert (caught.value.code, caught.value.retry_after) == ("token_quota_exceeded", 6400.0)
    quotas.require_tokens("bert")
    clock.now += 6400
    quotas.require_tokens("anna")
    assert quotas.state("anna").used.tokens == 0


def test_own_limits_stand_above_the_settings(quotas: QuotaStore) -> None:
    assert quotas.state("anna").limits == Quota(jobs=2)
    quotas.set("anna", Quota(jobs=5, bytes=7))
    assert quotas.set("anna", Quota(bytes=None)).limits == Quota(jobs=5)
    assert quotas.owners() == ["anna"]


@pytest.mark.parametrize(
    ("words", "limit"), [("none", None), ("0", 0), ("20", 20), ("3k", 3000), ("500G", 5 * 10**11), ("1T", 10**12)]
)
def test_limits_as_people_write_them(words: str, limit: int | None) -> None:
    assert parse_limit(words, "bytes") == limit


@pytest.mark.parametrize("words", ["", "G", "-1", "1.5G", "1e9", "²", "9" * 16, "10 GB"])
def test_limits_that_are_none(words: str) -> None:
    with pytest.raises(InvalidRequest, match="bytes") as caught:
        parse_limit(words, "bytes")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "bytes")
