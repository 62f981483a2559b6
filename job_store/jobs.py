"""Jobs as clients see them: create, read, list, cancel. Workers' side: `job_store.leases`."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, cast

from sqlalchemy import Engine, and_, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, ErrorBody, InvalidRequest, NotFound
from api_schemas.events import JobEvent
from api_schemas.heartbeats import Heartbeat
from api_schemas.jobs import TERMINAL, Job, JobRequest, JobStatus, Progress, Usage
from api_schemas.listing import Page
from api_schemas.recipe import Recipe
from job_store.database import reading, writing
from job_store.job_metadata import carries, refuse_nul
from job_store.owners import SERVER, Viewer
from job_store.quotas import admit_bytes, admit_job
from job_store.tables import EventRow, IdempotencyRow, JobRow
from job_store.transitions import advance, append_event


class IdempotencyKeyReused(InvalidRequest):
    """The key of an earlier request came with another payload."""

    status = 422


class JobStore:
    """The jobs of one database that a viewer may see; those of others are not found."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time, viewer: Viewer = SERVER) -> None:
        self._engine = engine
        self._clock = clock
        self._viewer = viewer

    def create(
        self,
        request: JobRequest,
        *,
        recipe_hash: str,
        kind: str = "compress",
        idempotency_key: str | None = None,
        artifact_bytes: int = 0,
    ) -> tuple[Job, bool]:
        """Store a queued job; the caller enqueues its id after this returns.

        Args:
            request: what a client sent.
            recipe_hash: names recipe and model.
            kind: of work.
            idempotency_key: of the request, if it had one.
            artifact_bytes: planned size of what the job will make, which must fit the owner's quota.

        Returns:
            The job, and whether it is new: a repeated `idempotency_key` with the same payload answers the first job.

        Raises:
            IdempotencyKeyReused: the key was used with another payload.
            TooManyRequests: `job_quota_exceeded`.
            NotPermitted: `byte_quota_exceeded`.
            InvalidRequest: a metadata value holds a NUL character.
        """
        refuse_nul(request.metadata)
        try:
            return self._create(request, recipe_hash, kind, idempotency_key, artifact_bytes)
        except IntegrityError:  # another process committed the same key between our look and our commit
            return self._create(request, recipe_hash, kind, idempotency_key, artifact_bytes)

    def replayed(self, request: JobRequest, idempotency_key: str, *, kind: str = "compress") -> Job | None:
        """The job that this key made; None where it made none.

        Raises:
            IdempotencyKeyReused: the key was used with another payload.
        """
        with reading(self._engine) as session:
            first = self._made_before(session, idempotency_key, _fingerprint(request, kind))
            return None if first is None else _view(self._row(session, first))

    def _create(
        self, request: JobRequest, recipe_hash: str, kind: str, key: str | None, artifact_bytes: int
    ) -> tuple[Job, bool]:
        fingerprint = _fingerprint(request, kind)
        with writing(self._engine) as session:
            first = None if key is None else self._made_before(session, key, fingerprint)
            if first is not None:
                return _view(self._locked(session, first)), False
            admit_job(session, self._viewer)
            admit_bytes(session, self._viewer, artifact_bytes, "recipe")
            now = self._clock()
            row = _new_row(request, recipe_hash, kind, now, self._viewer.owner)
            session.add(row)
            session.flush()
            append_event(session, row, now, "Job created")
            if key is not None:
                made = {"created_at": now, "fingerprint": fingerprint, "job_id": row.id}
                session.add(IdempotencyRow(owned_by=row.owned_by, key=key, **made))
            return _view(row), True

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFound: there is no such job.
        """
        with reading(self._engine) as session:
            return _view(self._row(session, job_id))

    def list(self, *, after: str | None, limit: int, metadata: Mapping[str, str]) -> Page[Job]:
        """Return a page of jobs, newest first, that carry all the given metadata.

        Raises:
            NotFound: `after` names no job.
        """
        refuse_nul(metadata)
        with reading(self._engine) as session:
            query = (
                self._viewer.only(select(JobRow), JobRow.owned_by)
                .order_by(JobRow.created_at.desc(), JobRow.id.desc())
                .limit(limit + 1)
            )
            if after is not None:
                last = self._row(session, after, param="after")
                older = JobRow.created_at < last.created_at
                query = query.where(or_(older, and_(JobRow.created_at == last.created_at, JobRow.id < last.id)))
            for key, value in metadata.items():
                query = query.where(carries(session, key, value))
            rows = session.scalars(query).all()
            jobs = [_view(row) for row in rows[:limit]]
        return Page[Job](
            data=jobs,
            has_more=len(rows) > limit,
            first_id=jobs[0].id if jobs else None,
            last_id=jobs[-1].id if jobs else None,
        )

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once; ask the worker of a running one to stop. Asking twice is harmless.

        Raises:
            NotFound: there is no such job.
            Conflict: the job has ended.
        """
        with writing(self._engine) as session:
            row = self._locked(session, job_id)
            if row.status in TERMINAL:
                raise Conflict(
                    "job_not_cancellable", f"job {job_id!r} has {row.status} already; only a live job can be cancelled"
                )
            if row.status == "queued":
                advance(session, row, "cancelled", self._clock(), "Job cancelled before it started")
            elif row.status == "running":
                advance(session, row, "cancelling", self._clock(), "Cancel requested; the worker is being told")
            return _view(row)

    def events(self, job_id: str, *, after: int, limit: int) -> Page[JobEvent]:
        """Return the events whose sequence number is greater than `after` (0: from the first), oldest first.

        Raises:
            NotFound: there is no such job.
        """
        with reading(self._engine) as session:
            self._row(session, job_id)
            query = select(EventRow).where(EventRow.job_id == job_id, EventRow.sequence > after)
            rows = session.scalars(query.order_by(EventRow.sequence).limit(limit + 1)).all()
            events = [_event_view(row) for row in rows[:limit]]
        return Page[JobEvent](
            data=events,
            has_more=len(rows) > limit,
            first_id=events[0].id if events else None,
            last_id=events[-1].id if events else None,
        )

    def report(self, job_id: str) -> dict[str, Any]:
        """Return the report of a job that has one.

        Raises:
            NotFound: there is no such job, or it has no report (yet).
        """
        with reading(self._engine) as session:
            row = self._row(session, job_id)
            if row.report is None:
                raise NotFound(
                    "report_not_ready", f"job {job_id!r} is {row.status} and has no report; wait until it has succeeded"
                )
            return row.report

    def flops_per_second(self) -> float | None:
        """The rate of the last job that succeeded on this server: planned operations per measured second.

        Jobs that searched are passed over: their plan is an upper bound.
        """
        exact = JobRow.report["search"].as_string().is_(None)
        last = select(JobRow.report).where(JobRow.status == "succeeded", exact).order_by(JobRow.finished_at.desc())
        with reading(self._engine) as session:
            report = session.scalar(last.limit(1))
        return None if report is None else float(report["plan"]["flops"] / report["seconds"])

    def _made_before(self, session: Session, key: str, fingerprint: str) -> str | None:
        """Id of the job that the owner's idempotency key made. Raises IdempotencyKeyReused for another payload."""
        seen = session.get(IdempotencyRow, (self._viewer.owner, key))
        if seen is None or seen.job_id is None:
            return None
        if seen.fingerprint != fingerprint:
            raise IdempotencyKeyReused(
                "idempotency_key_reused",
                f"Idempotency-Key {key!r} was used with another payload; send a new key for a new job",
                "Idempotency-Key",
            )
        return seen.job_id

    def _row(self, session: Session, job_id: str, param: str = "job_id") -> JobRow:
        row = session.get(JobRow, job_id) if "\0" not in job_id else None
        if row is None or not self._viewer.sees(row.owned_by):
            message = f"{param}: there is no job {job_id!r}; list the jobs to see their ids"
            raise NotFound("job_not_found", message, param)
        return row

    def _locked(self, session: Session, job_id: str) -> JobRow:
        self._row(session, job_id)
        return session.get_one(JobRow, job_id, with_for_update=True, populate_existing=True)


def _fingerprint(request: JobRequest, kind: str) -> str:
    payload = {"kind": kind, "request": request.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _new_row(request: JobRequest, recipe_hash: str, kind: str, now: float, owned_by: str) -> JobRow:
    return JobRow(
        id=f"job-{uuid.uuid4().hex[:24]}",
        created_at=now,
        status="queued",
        kind=kind,
        model=request.model,
        suffix=request.suffix,
        recipe=request.recipe.model_dump(mode="json"),
        recipe_hash=recipe_hash,
        job_metadata=dict(request.metadata),
        progress=Progress().model_dump(mode="json"),
        usage=Usage().model_dump(mode="json"),
        fence=0,
        lease_until=0.0,
        attempt=0,
        enqueued_at=now,
        next_sequence=1,
        owned_by=owned_by,
    )


def _seconds(value: float | None) -> int | None:
    return None if value is None else int(value)


def _view(row: JobRow) -> Job:
    recipe = Recipe.model_validate(row.recipe)
    return Job(
        id=row.id,
        created_at=int(row.created_at),
        started_at=_seconds(row.started_at),
        finished_at=_seconds(row.finished_at),
        estimated_finish=_seconds(row.estimated_finish),
        status=cast(JobStatus, row.status),
        model=row.model,
        compressed_model=row.compressed_model,
        recipe=recipe,
        recipe_hash=row.recipe_hash,
        seed=recipe.seed,
        progress=Progress.model_validate(row.progress),
        usage=Usage.model_validate(row.usage),
        attempt=row.attempt,
        heartbeat=None if row.heartbeat is None else Heartbeat.model_validate(row.heartbeat),
        error=None if row.error is None else ErrorBody.model_validate(row.error),
        result_files=tuple(sorted(row.report.get("files", {}))) if row.report else (),
        metadata=row.job_metadata,
    )


def _event_view(row: EventRow) -> JobEvent:
    return JobEvent.model_validate(
        {
            "id": f"{row.job_id}-{row.sequence}",
            "created_at": int(row.created_at),
            "level": row.level,
            "message": row.message,
            "type": row.type,
            "data": row.data,
            "sequence": row.sequence,
        }
    )
