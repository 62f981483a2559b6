"""The one place where a job's status changes, and where its events get their numbers."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from sqlalchemy.orm import Session

from api_schemas.events import Level, ProgressEvent
from api_schemas.jobs import TERMINAL, JobStatus
from job_store.tables import EventRow, JobRow
from job_store.webhooks import announce

ALLOWED: Mapping[JobStatus, frozenset[JobStatus]] = {
    "queued": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"queued", "cancelling", "succeeded", "failed", "cancelled"}),
    # a job may end by itself before the request to stop reaches it: then it says how it ended
    "cancelling": frozenset({"cancelled", "succeeded", "failed"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
MESSAGE_LENGTH = 4096


class IllegalTransition(Exception):
    """A programming error: a job was told to take a step that no job takes."""


def append_event(
    session: Session,
    row: JobRow,
    now: float,
    message: str,
    *,
    level: Level = "info",
    data: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Append an event under the job's next number. The caller holds the row's lock, so numbers have no gaps."""
    kind: Literal["message", "metrics"] = "metrics" if data else "message"
    event = EventRow(
        job_id=row.id,
        sequence=row.next_sequence,
        created_at=now,
        level=level,
        message=message[:MESSAGE_LENGTH],
        type=kind,
        data={**(progress or {}), **(data or {})},
    )
    session.add(event)
    row.next_sequence += 1


def append_progress(session: Session, row: JobRow, now: float, event: ProgressEvent) -> None:
    """Append what a job process said, and take over its progress and the estimate that follows from it."""
    row.progress = {
        "stage": event.stage,
        "block": event.block,
        "blocks_total": event.blocks_total,
        "percent": event.percent,
    }
    if row.started_at is not None and event.percent > 0.0:
        elapsed = now - row.started_at
        row.estimated_finish = now + elapsed * (100.0 - event.percent) / event.percent
    append_event(session, row, now, event.message, level=event.level, data=event.data, progress=row.progress)


def advance(
    session: Session,
    row: JobRow,
    to: JobStatus,
    now: float,
    message: str,
    *,
    level: Level = "info",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Move a job to another status and say so in its events and, at its end, to webhooks, in the caller's transaction.

    Raises:
        IllegalTransition: no job goes from its present status to `to`.
    """
    current = cast(JobStatus, row.status)
    if to not in ALLOWED[current]:
        raise IllegalTransition(f"job {row.id} cannot go from {current} to {to}")
    row.status = to
    if to in TERMINAL:
        row.finished_at = now
        row.estimated_finish = None
    if to in TERMINAL or to == "queued":
        row.owner = None
        row.lease_until = 0.0
    append_event(session, row, now, message, level=level, data=data)
    if to in TERMINAL:
        announce(session, row, now)
