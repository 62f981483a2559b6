"""The watch over one job process: relay its events, renew the lease, and stop it when it must stop."""

import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from api_schemas.events import ProgressEvent
from api_schemas.jobs import Usage
from job_store.leases import Claim
from workers.child import ChildProcess
from workers.workplace import Workplace

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # how often the row is asked whether to stop
WAIT_SECONDS = 0.2
Cause = Literal["cancelled", "fenced", "shutdown"]


class Watch:
    """Watches one child on behalf of one claim. `cause` tells why it was stopped, if it was."""

    def __init__(self, place: Workplace, claim: Claim, child: ChildProcess, stopping: Callable[[], bool]) -> None:
        self._place = place
        self._claim = claim
        self._child = child
        self._stopping = stopping
        self._started = time.monotonic()
        self._renewed = self._looked = self._started
        self._kill_at: float | None = None
        self._unsaid: deque[ProgressEvent] = deque()
        self.cause: Cause | None = None

    def until_end(self) -> int:
        """Return the child's exit status once it has ended, by itself or by us."""
        try:
            while not self._child.finished():
                self._hear(self._child.lines(WAIT_SECONDS))
                self._step()
            self._hear(self._child.drain())
            self._tell()
        finally:
            returncode = self._child.close()
        return returncode

    def usage(self) -> Usage:
        """Return what this attempt took so far, measured."""
        seconds = round(time.monotonic() - self._started, 3)
        return Usage(seconds=seconds, peak_rss_bytes=self._child.peak_rss_bytes or None)

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._child.sample_memory()
            self._ask(now)
        self._tell()
        if self._stopping():
            self._stop("shutdown")
        if self._kill_at is not None and now >= self._kill_at:
            self._child.signal_group(signal.SIGKILL)

    def _ask(self, now: float) -> None:
        settings = self._place.settings
        due = now - self._renewed >= settings.renew_seconds
        try:
            if due:
                status = self._place.leases.renew(self._claim.job_id, self._claim.fence, settings.lease_seconds)
                self._renewed = now
            else:
                status = self._place.leases.standing(self._claim.job_id, self._claim.fence)
        except SQLAlchemyError as error:
            logger.warning("job %s: the database does not answer: %s", self._claim.job_id, type(error).__name__)
            if now - self._renewed < settings.lease_seconds:
                return
            status = None  # the lease has run out: another worker may hold the job by now
        if status is None:
            self._stop("fenced")
        elif status == "cancelling":
            self._stop("cancelled")

    def _stop(self, cause: Cause) -> None:
        if cause == "fenced":
            self.cause = cause
            self._unsaid.clear()
            self._child.signal_group(signal.SIGKILL)
        elif self.cause is None:
            self.cause = cause
            self._kill_at = time.monotonic() + self._place.settings.cancel_grace_seconds
            self._child.signal_group(signal.SIGTERM)

    def _hear(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                self._unsaid.append(ProgressEvent.model_validate_json(line))
            except ValidationError as error:
                logger.error("job %s: an event that is none: %s", self._claim.job_id, error.errors(include_url=False))

    def _tell(self) -> None:
        if self.cause == "fenced":
            self._unsaid.clear()
        while self._unsaid:
            try:
                held = self._place.leases.record(
                    self._claim.job_id, self._claim.fence, self._unsaid[0], usage=self.usage()
                )
            except SQLAlchemyError as error:  # kept, and told again at the next step
                logger.warning("job %s: an event waits: %s", self._claim.job_id, type(error).__name__)
                return
            if not held:
                self._stop("fenced")
                return
            self._unsaid.popleft()
