"""What each owner may have: bytes at rest, jobs at a time, tokens a day. Checked in the transaction that adds to it."""

import time
from collections.abc import Callable

from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from api_schemas.errors import InvalidRequest, NotPermitted, TooManyRequests
from api_schemas.jobs import TERMINAL
from api_schemas.quotas import Quota, QuotaState, Used
from job_store.database import reading, writing
from job_store.owners import Viewer
from job_store.tables import FileRow, JobRow, ModelRow, QuotaRow, TokenRow, UploadRow

DAY = 86400
JOB_RETRY_SECONDS = 60.0


class QuotaStore:
    """Sets quotas, says how much of them is used, and counts tokens."""

    def __init__(self, engine: Engine, defaults: Quota, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._defaults = defaults
        self._clock = clock

    def set(self, owner: str, changes: Quota) -> QuotaState:
        """Give an owner limits of its own; those left out keep what they were."""
        with writing(self._engine) as session:
            row = session.get(QuotaRow, owner) or QuotaRow(owned_by=owner)
            for name, value in changes.model_dump(exclude_unset=True).items():
                setattr(row, name, value)
            session.add(row)
        return self.state(owner)

    def state(self, owner: str) -> QuotaState:
        """Return an owner's limits and what it uses of them."""
        with reading(self._engine) as session:
            limits = _limits(session, owner, self._defaults)
            used = Used(
                bytes=_bytes(session, owner), jobs=_jobs(session, owner), tokens=_tokens(session, owner, self._clock())
            )
        return QuotaState(owner=owner, limits=limits, used=used)

    def owners(self) -> list[str]:
        """Everybody who has limits of their own, or something that counts."""
        tables = (QuotaRow, FileRow, UploadRow, ModelRow, JobRow, TokenRow)
        with reading(self._engine) as session:
            return sorted({owner for table in tables for owner in session.scalars(select(table.owned_by).distinct())})

    def require_tokens(self, owner: str) -> None:
        """Refuse a chat when today's tokens are used up. Raises TooManyRequests `token_quota_exceeded`."""
        now = self._clock()
        with reading(self._engine) as session:
            limit = _limits(session, owner, self._defaults).tokens
            used = 0 if limit is None else _tokens(session, owner, now)
        if limit is not None and used >= limit:
            message = (
                f"owner {owner!r} has used {used} of {limit} tokens today; {_remedy('tokens', 'wait for midnight UTC')}"
            )
            raise TooManyRequests("token_quota_exceeded", message, "tokens", retry_after=DAY - now % DAY)

    def count_tokens(self, owner: str, tokens: int) -> None:
        """Add to today's tokens."""
        day = int(self._clock() // DAY)
        with writing(self._engine) as session:
            lock_owner(session, owner)
            row = session.get(TokenRow, (owner, day)) or TokenRow(owned_by=owner, day=day, tokens=0)
            row.tokens += tokens
            session.add(row)


def admit_bytes(session: Session, viewer: Viewer, more: int, param: str) -> None:
    """Refuse bytes that would pass the owner's quota, inside the transaction that adds them.

    Raises:
        NotPermitted: `byte_quota_exceeded`, naming `param`.
    """
    limit = _locked_limits(session, viewer).bytes
    if limit is None:
        return
    used = _bytes(session, viewer.owner)
    if used + more > limit:
        message = (
            f"{param}: {more} bytes more do not fit: owner {viewer.owner!r} uses {used} of {limit}; "
            f"{_remedy('bytes', 'delete files or models')}"
        )
        raise NotPermitted("byte_quota_exceeded", message, param)


def admit_job(session: Session, viewer: Viewer) -> None:
    """Refuse a job above the owner's quota, inside the transaction that adds it.

    Raises:
        TooManyRequests: `job_quota_exceeded`.
    """
    limit = _locked_limits(session, viewer).jobs
    if limit is None:
        return
    live = _jobs(session, viewer.owner)
    if live >= limit:
        message = (
            f"owner {viewer.owner!r} has {live} of {limit} jobs waiting or running; "
            f"{_remedy('jobs', 'wait for the end of one or cancel it')}"
        )
        raise TooManyRequests("job_quota_exceeded", message, "model", retry_after=JOB_RETRY_SECONDS)


def lock_owner(session: Session, owner: str) -> None:
    """Make writers of one owner wait for each other until the transaction ends; on SQLite all writers do already."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:owner))"), {"owner": f"modepress:{owner}"})


def parse_limit(words: str, param: str) -> int | None:
    """Return a limit from `none` or a whole number with k, M, G or T (powers of 1000) behind it.

    Raises:
        InvalidRequest: `invalid_value`.
    """
    if words == "none":
        return None
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    number, unit = (words[:-1], units[words[-1:].lower()]) if words[-1:].lower() in units else (words, 1)
    if not (number.isascii() and number.isdigit() and len(number) <= 15):
        message = f"{param} {words[:40]!r} must be 'none' or a whole number, as in 20 or 500G"
        raise InvalidRequest("invalid_value", message, param)
    return int(number) * unit


def _locked_limits(session: Session, viewer: Viewer) -> Quota:
    if viewer.quota is None:  # the server's own work
        return Quota()
    lock_owner(session, viewer.owner)
    return _limits(session, viewer.owner, viewer.quota)


def _limits(session: Session, owner: str, defaults: Quota) -> Quota:
    row = session.get(QuotaRow, owner)
    own = {} if row is None else {"bytes": row.bytes, "jobs": row.jobs, "tokens": row.tokens}
    return defaults.model_copy(update={name: value for name, value in own.items() if value is not None})


def _remedy(what: str, do: str) -> str:
    return f"{do}, or ask the operator for more (`modepress quotas set OWNER --{what} …`)"


def _jobs(session: Session, owner: str) -> int:
    live = select(func.count()).select_from(JobRow).where(JobRow.owned_by == owner, JobRow.status.not_in(TERMINAL))
    return session.scalar(live) or 0


def _tokens(session: Session, owner: str, now: float) -> int:
    row = session.get(TokenRow, (owner, int(now // DAY)))
    return 0 if row is None else row.tokens


def _bytes(session: Session, owner: str) -> int:
    pending = (UploadRow.owned_by == owner, UploadRow.status == "pending")
    files = session.scalar(select(func.sum(FileRow.bytes)).where(FileRow.owned_by == owner)) or 0
    uploads = session.scalar(select(func.sum(UploadRow.bytes)).where(*pending)) or 0
    return files + uploads + _model_bytes(session, owner)


def _model_bytes(session: Session, owner: str) -> int:
    """Bytes of models that lie in the data folder. One made of uploads shares its bytes with them while they exist."""
    mine = (ModelRow.owned_by == owner, ModelRow.origin != "path")
    rows = session.execute(select(ModelRow.facts, ModelRow.origin, ModelRow.request).where(*mine)).all()
    named = {file["file_id"] for _, origin, request in rows if origin == "upload" for file in request["files"]}
    there = set(session.scalars(select(FileRow.id).where(FileRow.id.in_(named)))) if named else set()
    return sum(
        int((facts or {}).get("bytes", 0))
        for facts, origin, request in rows
        if origin != "upload" or not all(file["file_id"] in there for file in request["files"])
    )
