"""Sends the messages of webhooks, signed by Standard Webhooks 1.0, again until they arrive or days are over."""

import base64
import hashlib
import hmac
import http.client
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from api_schemas.errors import InvalidRequest
from job_store.database import reading, writing
from job_store.outbound import Dial, Resolve, connected, dial, system_resolver
from job_store.settings import Settings
from job_store.tables import DeliveryRow, WebhookRow
from job_store.webhooks import webhook_target

logger = logging.getLogger(__name__)

# Seconds from one try to the next: what the specification recommends.
BACKOFF = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
POLL_SECONDS = 2.0
ANSWER_SECONDS = 15.0
CLAIM_SECONDS = 60.0  # a sender that dies in between: somebody else tries after this
BATCH = 20
GONE = 410
ERROR_LENGTH = 200


@dataclass(frozen=True)
class _Message:
    id: str
    attempts: int
    url: str
    secret: str
    body: str


class Messenger(threading.Thread):
    """A thread of the API process. Several may run at once: each message is claimed before it is sent."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        resolve: Resolve = system_resolver,
        dial: Dial = dial,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name="messenger", daemon=True)
        self._engine = engine
        self._private_hosts = settings.private_webhook_hosts
        self._resolve = resolve
        self._dial = dial
        self._clock = clock
        self._stopping = threading.Event()

    def run(self) -> None:
        """Send what is due until `stop`. A database that is away is tried again."""
        while not self._stopping.wait(POLL_SECONDS):
            try:
                self.send_due()
            except SQLAlchemyError as error:
                logger.warning("webhooks wait for the database (%s)", type(error).__name__)

    def stop(self) -> None:
        """Ask the thread to end and wait for the message that is under way."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def send_due(self) -> int:
        """Send what is due now, once each; returns how many were tried."""
        messages = self._claim()
        for message in messages:
            if self._stopping.is_set():
                break
            status, error = self._post(message)
            self._note(message, status, error)
        return len(messages)

    def _claim(self) -> list[_Message]:
        now = self._clock()
        due = select(DeliveryRow).where(DeliveryRow.status == "pending", DeliveryRow.next_at <= now)
        with reading(self._engine) as session:
            if session.scalar(due.limit(1)) is None:
                return []  # the usual case takes no lock
        with writing(self._engine) as session:
            oldest = due.order_by(DeliveryRow.next_at).limit(BATCH).with_for_update(skip_locked=True)
            messages = []
            for row in session.scalars(oldest):
                hook = session.get_one(WebhookRow, row.webhook_id)
                row.next_at = now + CLAIM_SECONDS
                row.attempts += 1
                messages.append(_Message(row.id, row.attempts, hook.url, hook.secret, row.body))
            return messages

    def _post(self, message: _Message) -> tuple[int | None, str | None]:
        """Return the answer's status, and what went wrong, if anything."""
        try:
            target = webhook_target(message.url, self._private_hosts, self._resolve)
            deadline = time.monotonic() + ANSWER_SECONDS
            headers = {**signed(message.id, int(self._clock()), message.body, message.secret), "Host": target.authority}
            with connected(target, deadline, self._dial) as connection:
                connection.request("POST", target.path, body=message.body.encode(), headers=headers)
                status = connection.getresponse().status
        except InvalidRequest as error:
            return None, error.message[:ERROR_LENGTH]
        except (OSError, http.client.HTTPException, ValueError) as error:
            return None, f"no answer ({type(error).__name__})"
        return status, None if 200 <= status < 300 else f"answered {status}"

    def _note(self, message: _Message, status: int | None, error: str | None) -> None:
        with writing(self._engine) as session:
            row = session.get(DeliveryRow, message.id)
            if row is None:  # its webhook was deleted meanwhile
                return
            row.last_status, row.last_error = status, error
            if error is None:
                row.status = "delivered"
            elif status == GONE:
                row.status = "failed"
                session.get_one(WebhookRow, row.webhook_id).disabled = "the receiver answered 410 (gone)"
            elif message.attempts > len(BACKOFF):
                row.status = "failed"
            else:
                row.next_at = self._clock() + BACKOFF[message.attempts - 1]


def signed(message_id: str, timestamp: int, body: str, secret: str) -> dict[str, str]:
    """Return the headers of a message: HMAC-SHA256 over `id.timestamp.body` (Standard Webhooks 1.0)."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
        "content-type": "application/json",
        "user-agent": "modepress",
        "connection": "close",
    }
