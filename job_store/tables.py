"""The tables. The database owns every job; brokers only carry ids."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, mapped_column

from api_schemas.keys import DEFAULT_OWNER


class Base(DeclarativeBase):
    """Declarative base; JSON columns hold `model_dump(mode="json")` of a schema."""

    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 (SQLAlchemy's own idiom)


def _owned_by(*, primary_key: bool = False) -> MappedColumn[str]:
    """Whose row it is. The server's default serves rows that an older version of the service writes."""
    return mapped_column(String(64), default=DEFAULT_OWNER, server_default=DEFAULT_OWNER, primary_key=primary_key)


class FileRow(Base):
    """A stored file; bytes live in the file store under their SHA-256, shared by equal files."""

    __tablename__ = "files"
    __table_args__ = (Index("files_by_owner", "owned_by", "created_at", "id"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    owned_by: Mapped[str] = _owned_by()


class UploadRow(Base):
    """A resumable upload."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    owned_by: Mapped[str] = _owned_by()


class UploadPartRow(Base):
    """One part that has landed. A part sent again under its number replaces the first."""

    __tablename__ = "upload_parts"
    __table_args__ = (UniqueConstraint("upload_id", "number"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    number: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[float] = mapped_column(Float)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class ModelRow(Base):
    """A model that can be compressed or served. `path` is a folder; artifacts name their parent and job."""

    __tablename__ = "models"
    __table_args__ = (Index("models_by_owner", "owned_by", "created_at", "id"),)
    id: Mapped[str] = mapped_column(String(256), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    status: Mapped[str] = mapped_column(String(16))
    origin: Mapped[str] = mapped_column(String(16))
    path: Mapped[str] = mapped_column(String(4096))
    parent: Mapped[str | None] = mapped_column(String(256))
    job: Mapped[str | None] = mapped_column(String(64))
    facts: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    request: Mapped[dict[str, Any]]
    owned_by: Mapped[str] = _owned_by()


class JobRow(Base):
    """A compression job: its recipe, its status, and who holds it until when under which fence.

    `owner` is the worker that holds it; whose job it is says `owned_by`.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_age", "created_at", "id"),
        Index("jobs_by_lease", "status", "lease_until"),
        Index("jobs_by_owner", "owned_by", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)
    estimated_finish: Mapped[float | None] = mapped_column(Float)
    status: Mapped[str] = mapped_column(String(16))
    kind: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(String(256))
    suffix: Mapped[str | None] = mapped_column(String(64))
    compressed_model: Mapped[str | None] = mapped_column(String(256))
    recipe: Mapped[dict[str, Any]]
    recipe_hash: Mapped[str] = mapped_column(String(64))
    job_metadata: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]]
    usage: Mapped[dict[str, Any]]
    report: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    owner: Mapped[str | None] = mapped_column(String(256))
    fence: Mapped[int] = mapped_column(Integer)
    lease_until: Mapped[float] = mapped_column(Float)
    attempt: Mapped[int] = mapped_column(Integer)
    enqueued_at: Mapped[float] = mapped_column(Float)
    heartbeat: Mapped[dict[str, Any] | None]
    memory_retries: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    next_sequence: Mapped[int] = mapped_column(Integer)
    owned_by: Mapped[str] = _owned_by()


class EventRow(Base):
    """One event of a job, in order of `sequence`, written in the transaction that changed the job."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(String(4096))
    type: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]]


class IdempotencyRow(Base):
    """An owner's `Idempotency-Key` and what it answered; the payload's fingerprint tells a replay from a reuse."""

    __tablename__ = "idempotency_keys"
    owned_by: Mapped[str] = _owned_by(primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    fingerprint: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(String(64))


class ApiKeyRow(Base):
    """An API key; only the SHA-256 of its 256-bit secret is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    name: Mapped[str] = mapped_column(String(128))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    revoked_at: Mapped[float | None] = mapped_column(Float)
    owned_by: Mapped[str] = _owned_by()
    scopes: Mapped[list[str]] = mapped_column(JSON, server_default='["admin"]')
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    concurrent_requests: Mapped[int | None] = mapped_column(Integer)


class QuotaRow(Base):
    """Limits of one owner that differ from the settings'. Null: the setting holds."""

    __tablename__ = "quotas"
    owned_by: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    jobs: Mapped[int | None] = mapped_column(Integer)
    tokens: Mapped[int | None] = mapped_column(BigInteger)


class AuditRow(Base):
    """One line of the audit log."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_by_owner", "owned_by", "id"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    created_at: Mapped[float] = mapped_column(Float)
    actor: Mapped[str] = mapped_column(String(64))
    owned_by: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(128))
    target: Mapped[str | None] = mapped_column(String(256))
    status: Mapped[int] = mapped_column(Integer)
    address: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(128))


class WebhookRow(Base):
    """An address that is told of the ends of an owner's jobs. The secret is kept as it is: signing needs it."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("webhooks_by_owner", "owned_by"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    owned_by: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(String(2048))
    events: Mapped[list[str]]
    secret: Mapped[str] = mapped_column(String(64))
    disabled: Mapped[str | None] = mapped_column(String(256))


class DeliveryRow(Base):
    """A message to a webhook: its bytes, which never change, and when it is tried next."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("deliveries_due", "status", "next_at"),
        Index("deliveries_by_webhook", "webhook_id", "created_at"),
    )
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)
    type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(Integer)
    next_at: Mapped[float] = mapped_column(Float)
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(String(256))


class TokenRow(Base):
    """Tokens that an owner's chats took on one day, counted from 1970 in UTC."""

    __tablename__ = "tokens"
    owned_by: Mapped[str] = mapped_column(String(64), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    tokens: Mapped[int] = mapped_column(BigInteger)


class WorkerRow(Base):
    """A worker that was started, and what it found of itself then."""

    __tablename__ = "workers"
    __table_args__ = (Index("workers_by_class", "worker_class", "started_at"),)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(256))
    worker_class: Mapped[str] = mapped_column(String(256))
    started_at: Mapped[float] = mapped_column(Float)
    seen_at: Mapped[float] = mapped_column(Float)
    stopped_at: Mapped[float | None] = mapped_column(Float)
    standing: Mapped[str] = mapped_column(String(16))
    slow_blocks: Mapped[int] = mapped_column(Integer)
    checks: Mapped[dict[str, Any]]
    seconds: Mapped[float] = mapped_column(Float)


class BlockTimeRow(Base):
    """How long a worker took for one block; of each kind and class of worker the latest are kept."""

    __tablename__ = "block_times"
    __table_args__ = (Index("block_times_by_kind", "worker_class", "kind", "id"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    job_id: Mapped[str] = mapped_column(String(64))
    block: Mapped[int] = mapped_column(Integer)
    worker_id: Mapped[str | None] = mapped_column(String(64))
    worker_class: Mapped[str] = mapped_column(String(256))
    kind: Mapped[str] = mapped_column(String(400))
    seconds: Mapped[float] = mapped_column(Float)
    slow: Mapped[bool] = mapped_column(Boolean)
