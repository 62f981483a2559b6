"""Webhooks and their messages. The transaction that ends a job writes the message: none is lost, none invented."""

import base64
import json
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.listing import Page
from api_schemas.webhooks import Delivery, NewWebhook, Webhook, WebhookRequest
from job_store.database import reading, writing
from job_store.outbound import SHOWN, BadUrl, Resolve, Target, Unresolved, is_listed, is_public, look_up, split_url
from job_store.owners import SERVER, Viewer
from job_store.tables import DeliveryRow, JobRow, WebhookRow

MOST_PER_OWNER = 20


class WebhookStore:
    """The webhooks that a viewer may see; those of others are not found."""

    def __init__(
        self, engine: Engine, private_hosts: frozenset[str], resolve: Resolve, *, viewer: Viewer = SERVER,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._private_hosts = private_hosts
        self._resolve = resolve
        self._viewer = viewer
        self._clock = clock

    def create(self, request: WebhookRequest) -> NewWebhook:
        """Make a webhook; the returned secret is shown this once.

        Raises:
            InvalidRequest: `invalid_webhook_url`, `webhook_address_not_allowed`.
            Conflict: `too_many_webhooks`.
        """
        webhook_target(request.url, self._private_hosts, self._resolve)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        row = WebhookRow(
            id=f"webhook_{secrets.token_hex(12)}",
            created_at=self._clock(),
            owned_by=self._viewer.owner,
            url=request.url,
            events=list(request.events),
            secret=secret,
            disabled=None,
        )
        mine = select(func.count()).select_from(WebhookRow).where(WebhookRow.owned_by == self._viewer.owner)
        with writing(self._engine) as session:
            if (session.scalar(mine) or 0) >= MOST_PER_OWNER:
                message = f"owner {self._viewer.owner!r} has {MOST_PER_OWNER} webhooks already; delete one first"
                raise Conflict("too_many_webhooks", message, "url")
            session.add(row)
        return NewWebhook(**_to_webhook(row).model_dump(), secret=secret)

    def get(self, webhook_id: str) -> Webhook:
        """Return a webhook. Raises NotFound."""
        with reading(self._engine) as session:
            return _to_webhook(self._row(session, webhook_id))

    def list(self) -> Page[Webhook]:
        """Return all of them, oldest first."""
        statement = self._viewer.only(select(WebhookRow), WebhookRow.owned_by)
        with reading(self._engine) as session:
            rows = session.scalars(statement.order_by(WebhookRow.created_at, WebhookRow.id)).all()
        data = [_to_webhook(row) for row in rows]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return Page[Webhook](data=data, has_more=False, first_id=ends[0], last_id=ends[1])

    def delete(self, webhook_id: str) -> None:
        """Forget a webhook and what it was still to be told. Raises NotFound."""
        with writing(self._engine) as session:
            session.delete(self._row(session, webhook_id))

    def deliveries(self, webhook_id: str, *, limit: int) -> Page[Delivery]:
        """Return the newest messages to a webhook. Raises NotFound."""
        statement = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
        with reading(self._engine) as session:
            self._row(session, webhook_id)
            newest = statement.order_by(DeliveryRow.created_at.desc(), DeliveryRow.id.desc()).limit(limit + 1)
            rows = session.scalars(newest).all()
        data = [_to_delivery(row) for row in rows[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return Page[Delivery](data=data, has_more=len(rows) > limit, first_id=ends[0], last_id=ends[1])

    def _row(self, session: Session, webhook_id: str) -> WebhookRow:
        row = None if "\0" in webhook_id else session.get(WebhookRow, webhook_id)
        if row is None or not self._viewer.sees(row.owned_by):
            message = f"no webhook has id {webhook_id!r}; GET /v1/webhooks lists those there are"
            raise NotFound("webhook_not_found", message, "webhook_id")
        return row


def announce(session: Session, job: JobRow, now: float) -> None:
    """Write a message to each webhook of the job's owner that wants this end, in the transaction that ends the job."""
    kind = f"compression.job.{job.status}"
    hooks = select(WebhookRow).where(WebhookRow.owned_by == job.owned_by, WebhookRow.disabled.is_(None))
    with session.no_autoflush:  # the job's own changes go out with the commit
        wanting = session.scalars(hooks).all()
    for hook in wanting:
        if kind not in hook.events:
            continue
        error = None if job.error is None else job.error.get("code")
        data = {"id": job.id, "status": job.status, "model": job.model, "error": error}
        data["compressed_model"] = job.compressed_model
        body = {"type": kind, "timestamp": datetime.fromtimestamp(now, UTC).isoformat(), "data": data}
        session.add(
            DeliveryRow(
                id=f"msg_{secrets.token_hex(12)}",
                webhook_id=hook.id,
                job_id=job.id,
                created_at=now,
                type=kind,
                body=json.dumps(body, separators=(",", ":")),
                status="pending",
                attempts=0,
                next_at=now,
            )
        )


def webhook_target(url: str, private_hosts: frozenset[str], resolve: Resolve) -> Target:
    """Check where a webhook leads, and look its host up.

    Args:
        url: `https`, or also `http` for a host on the list.
        private_hosts: names that need not be on the public internet, with `:port` for another than 80 and 443.
        resolve: looks up a name.

    Raises:
        InvalidRequest: `invalid_webhook_url`, `webhook_address_not_allowed`.
    """
    try:
        scheme, host, port, path = split_url(url)
        listed = is_listed(scheme, host, port, private_hosts)
        if scheme != "https" and not listed:
            raise BadUrl("it is not https")
        addresses = look_up(host, port, resolve)
    except (BadUrl, Unresolved) as error:
        message = f"url {url[:SHOWN]!r} cannot be told anything: {error}; give https://host/path"
        raise InvalidRequest("invalid_webhook_url", message, "url") from error
    if not listed and not all(map(is_public, addresses)):
        message = (
            f"url: {host[:SHOWN]!r} is not on the public internet; give another, or let the operator add the host to "
            "MODEPRESS_WEBHOOK_PRIVATE_HOSTS"
        )
        raise InvalidRequest("webhook_address_not_allowed", message, "url")
    return Target(scheme == "https", host, port, addresses, path)


def _to_webhook(row: WebhookRow) -> Webhook:
    return Webhook.model_validate(
        {
            "id": row.id,
            "created_at": int(row.created_at),
            "owner": row.owned_by,
            "url": row.url,
            "events": tuple(row.events),
            "disabled": row.disabled,
        }
    )


def _to_delivery(row: DeliveryRow) -> Delivery:
    return Delivery.model_validate(
        {
            "id": row.id,
            "created_at": int(row.created_at),
            "job": row.job_id,
            "type": row.type,
            "status": row.status,
            "attempts": row.attempts,
            "next_attempt_at": int(row.next_at) if row.status == "pending" else None,
            "last_status": row.last_status,
            "last_error": row.last_error,
        }
    )
