"""The audit log: rows are only added, and go when they are older than the operator keeps them."""

import time
from collections.abc import Callable

from sqlalchemy import Engine, select

from api_schemas.audit import AuditEntry
from api_schemas.errors import InvalidRequest
from api_schemas.listing import Page
from job_store.database import reading, writing
from job_store.tables import AuditRow

TARGET_LENGTH = 256


class AuditLog:
    """Writes and reads the log."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def record(
        self,
        actor: str,
        owner: str,
        action: str,
        *,
        target: str | None = None,
        status: int = 0,
        address: str | None = None,
        request_id: str | None = None,
    ) -> None:
        """Add a line."""
        shown = None if target is None else target.replace("\0", "")[:TARGET_LENGTH]
        row = AuditRow(
            created_at=self._clock(),
            actor=actor,
            owned_by=owner,
            action=action,
            target=shown,
            status=status,
            address=address,
            request_id=request_id,
        )
        with writing(self._engine) as session:
            session.add(row)

    def list(self, *, after: str | None, limit: int, owner: str | None = None) -> Page[AuditEntry]:
        """Return a page, newest first. Raises InvalidRequest when `after` is no id."""
        statement = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit + 1)
        if after is not None:
            if not (after.isascii() and after.isdigit() and len(after) <= 18):
                raise InvalidRequest("invalid_value", f"after {after[:40]!r} is no id of an audit entry", "after")
            statement = statement.where(AuditRow.id < int(after))
        if owner is not None:
            statement = statement.where(AuditRow.owned_by == owner)
        with reading(self._engine) as session:
            rows = session.scalars(statement).all()
        data = [_to_entry(row) for row in rows[:limit]]
        ends = (str(data[0].id), str(data[-1].id)) if data else (None, None)
        return Page[AuditEntry](data=data, has_more=len(rows) > limit, first_id=ends[0], last_id=ends[1])


def _to_entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        created_at=int(row.created_at),
        actor=row.actor,
        owner=row.owned_by,
        action=row.action,
        target=row.target,
        status=row.status,
        address=row.address,
        request_id=row.request_id,
    )
