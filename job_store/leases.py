"""Jobs as workers see them: claim under a lease, renew, report, finish. Clients' side: `job_store.jobs`.

Each claim raises the job's *fence*. Only the holder of the current fence writes; a worker that was silent for too long
finds its fence outdated, and whatever it still wants to say is refused.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, ErrorBody
from api_schemas.events import Level, ProgressEvent
from api_schemas.heartbeats import Heartbeat
from api_schemas.jobs import JobStatus, Usage
from api_schemas.recipe import Recipe
from job_store.database import reading, writing
from job_store.tables import JobRow, ModelRow
from job_store.transitions import advance, append_event, append_progress

HELD = ("running", "cancelling")
RESEND_BATCH = 100


@dataclass(frozen=True)
class Claim:
    """A job held by one worker: what to do, and the fence under which to report."""

    job_id: str
    fence: int
    attempt: int
    model: str
    recipe: Recipe
    suffix: str | None
    memory_retries: int = 0
    first_started_at: float = 0.0


@dataclass(frozen=True)
class Ending:
    """How a job ended, and everything that becomes true with it."""

    status: Literal["succeeded", "failed", "cancelled"]
    message: str
    usage: Usage
    report: dict[str, Any] | None = None
    error: ErrorBody | None = None
    artifact: ModelRow | None = None

    @property
    def level(self) -> Level:
        """How loud the last event is."""
        return "error" if self.status == "failed" else "info"


class LeaseStore:
    """The workers' and the reaper's side of the jobs of one database."""

    def __init__(self, engine: Engine, *, max_attempts: int, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._max_attempts = max_attempts
        self._clock = clock

    def claim(self, job_id: str, owner: str, lease_seconds: float) -> Claim | None:
        """Take a queued job, or one whose holder's lease has run out; None when there is nothing to take."""
        with writing(self._engine) as session:
            row, now = self._lock(session, job_id), self._clock()
            if row is None:
                return None
            if row.status == "running" and row.lease_until < now and row.attempt < self._max_attempts:
                advance(session, row, "queued", now, f"Worker {row.owner} went silent", level="warn")
            if row.status != "queued":
                return None
            row.fence += 1
            row.attempt += 1
            row.owner, row.lease_until = owner, now + lease_seconds
            row.started_at = now if row.started_at is None else row.started_at
            advance(session, row, "running", now, f"Attempt {row.attempt} started by {owner}")
            return Claim(
                job_id=row.id,
                fence=row.fence,
                attempt=row.attempt,
                model=row.model,
                recipe=Recipe.model_validate(row.recipe),
                suffix=row.suffix,
                memory_retries=row.memory_retries,
                first_started_at=row.started_at,
            )

    def renew(self, job_id: str, fence: int, lease_seconds: float) -> JobStatus | None:
        """Extend the lease and return the status (`cancelling` asks to stop); None: fenced off, write nothing more."""
        held = (JobRow.id == job_id, JobRow.fence == fence, JobRow.status.in_(HELD))
        statement = update(JobRow).where(*held).values(lease_until=self._clock() + lease_seconds)
        with writing(self._engine) as session:
            status = session.execute(statement.returning(JobRow.status)).scalar_one_or_none()
        return cast(JobStatus | None, status)

    def standing(self, job_id: str, fence: int) -> JobStatus | None:
        """Return the status as `renew` does, without extending the lease."""
        held = (JobRow.id == job_id, JobRow.fence == fence, JobRow.status.in_(HELD))
        with reading(self._engine) as session:
            return cast(JobStatus | None, session.scalar(select(JobRow.status).where(*held)))

    def record(self, job_id: str, fence: int, event: ProgressEvent, *, usage: Usage | None = None) -> bool:
        """Append what the job process said and take over its progress; False when fenced off."""
        with writing(self._engine) as session:
            row = self._held(session, job_id, fence)
            if row is None:
                return False
            append_progress(session, row, self._clock(), event)
            if usage is not None:
                row.usage = usage.model_dump(mode="json")
            return True

    def beat(self, job_id: str, fence: int, heartbeat: Heartbeat, *, said: str | None) -> bool:
        """Keep the latest heartbeat; with `said` it becomes an event too. False when fenced off."""
        with writing(self._engine) as session:
            row = self._held(session, job_id, fence)
            if row is None:
                return False
            row.heartbeat = heartbeat.model_dump(mode="json")
            if said is not None:
                append_event(session, row, self._clock(), said, data={"heartbeat": row.heartbeat})
            return True

    def note(self, job_id: str, fence: int, message: str, *, level: Level, data: Mapping[str, Any]) -> bool:
        """Append what the supervisor has seen to the job's events; False when fenced off."""
        with writing(self._engine) as session:
            row = self._held(session, job_id, fence)
            if row is not None:
                append_event(session, row, self._clock(), message, level=level, data=data)
            return row is not None

    def finish(self, job_id: str, fence: int, ending: Ending, *, publish: Callable[[], None] | None = None) -> bool:
        """End a job: status, report, error, the artifact's row and the last event in one transaction.

        Args:
            job_id: the job.
            fence: the fence of the claim.
            ending: how it ended.
            publish: moves the artifact to its place; called while the row is locked and the fence holds, so that no
                other holder can be publishing too. When it raises, nothing is written.

        Returns:
            False when fenced off; then nothing was written and `publish` was not called.

        Raises:
            Conflict: a model of the artifact's name was registered by somebody else in the meantime.
        """
        with writing(self._engine) as session:
            row, now = self._held(session, job_id, fence), self._clock()
            if row is None:
                return False
            if ending.artifact is not None:
                _refuse_foreign(session, ending.artifact)
            if publish is not None:
                publish()
            if ending.artifact is not None:
                ending.artifact.owned_by = row.owned_by
                session.merge(ending.artifact)
                row.compressed_model = ending.artifact.id
            row.report = ending.report
            row.error = None if ending.error is None else ending.error.model_dump(mode="json")
            row.usage = ending.usage.model_dump(mode="json")
            if ending.status == "succeeded":
                row.progress = {**row.progress, "percent": 100.0}
            advance(session, row, ending.status, now, ending.message, level=ending.level)
            return True

    def release(
        self,
        job_id: str,
        fence: int,
        reason: str,
        *,
        error: ErrorBody,
        counted: bool = True,
        out_of_memory: bool = False,
    ) -> JobStatus | None:
        """Give a job back after its process died: queued again, or failed with `error` when attempts are used up.

        Args:
            job_id: the job.
            fence: the fence of the claim.
            reason: what happened, for the event.
            error: stored when the job is given up.
            counted: False when the worker is to blame, as when it is told to stop; the attempt is given back.
            out_of_memory: tried once more, in smaller pieces; a second time ends the job.

        Returns:
            The new status, or None when fenced off.
        """
        with writing(self._engine) as session:
            row = self._held(session, job_id, fence)
            if row is None:
                return None
            if not counted:
                row.attempt -= 1
                reason += ", which costs no attempt"
            row.memory_retries += out_of_memory
            self._give_back(session, row, reason, error, last=out_of_memory and row.memory_retries > 1)
            return cast(JobStatus, row.status)

    def reap(self) -> list[str]:
        """Take jobs from workers whose lease has run out.

        Returns:
            Ids of the jobs that are queued again and need a message.
        """
        error = ErrorBody(
            message="the worker went silent too often; see the events, then submit the job again",
            type="job_error",
            param=None,
            code="worker_lost",
        )
        expired = select(JobRow).where(JobRow.status.in_(HELD), JobRow.lease_until < self._clock())
        with writing(self._engine) as session:
            rows = session.scalars(expired.with_for_update(skip_locked=True)).all()
            for row in rows:
                self._give_back(session, row, f"Worker {row.owner} went silent", error)
            return [row.id for row in rows if row.status == "queued"]

    def overdue(self, seconds: float) -> list[str]:
        """Return queued jobs that were sent more than `seconds` ago, and count them as sent again now."""
        now = self._clock()
        waiting = select(JobRow).where(JobRow.status == "queued", JobRow.enqueued_at < now - seconds)
        with writing(self._engine) as session:
            oldest = waiting.order_by(JobRow.created_at).limit(RESEND_BATCH)
            rows = session.scalars(oldest.with_for_update(skip_locked=True)).all()
            for row in rows:
                row.enqueued_at = now
            return [row.id for row in rows]

    def _give_back(self, session: Session, row: JobRow, reason: str, error: ErrorBody, *, last: bool = False) -> None:
        now = self._clock()
        if row.status == "cancelling":
            advance(session, row, "cancelled", now, f"Job cancelled ({reason})")
        elif row.attempt < self._max_attempts and not last:
            again = f"{reason}; the job is queued again after {row.attempt} of {self._max_attempts} attempts"
            advance(session, row, "queued", now, again, level="warn")
            row.enqueued_at = now
        else:
            row.error = error.model_dump(mode="json")
            end = f"{reason}; attempt {row.attempt} of {self._max_attempts} was the last"
            advance(session, row, "failed", now, end, level="error")

    @staticmethod
    def _lock(session: Session, job_id: str) -> JobRow | None:
        return session.get(JobRow, job_id, with_for_update=True)

    def _held(self, session: Session, job_id: str, fence: int) -> JobRow | None:
        row = self._lock(session, job_id)
        return row if row is not None and row.fence == fence and row.status in HELD else None


def _refuse_foreign(session: Session, artifact: ModelRow) -> None:
    present = session.get(ModelRow, artifact.id)
    if present is not None and present.job != artifact.job:
        raise Conflict(
            "model_exists",
            f"model {artifact.id!r} was registered meanwhile; submit the job again with a suffix",
            "suffix",
        )
