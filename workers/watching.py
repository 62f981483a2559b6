"""The watch over one job process: relay its events, renew the lease, and stop it when it must stop."""

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from api_schemas.base import Frozen
from api_schemas.events import ProgressEvent
from api_schemas.heartbeats import Pulse, in_words
from api_schemas.jobs import Usage
from job_store.leases import Claim
from job_store.trace_files import WATCH_THREAD, TraceFile
from workers.child import ChildProcess
from workers.description import EXIT_FAILED, EXIT_OK, STACKS
from workers.stragglers import BlockWatch
from workers.vital_signs import VitalSigns
from workers.workplace import Workplace

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # how often the row is asked whether to stop
WAIT_SECONDS = 0.2
DUMP_SECONDS = 3.0  # for a stalled process to write its stacks, before it is killed
STACK_LENGTH = 16384
PULSE = b'{"pulse":'
WORDS_SAID = (EXIT_OK, EXIT_FAILED)  # the process ended by itself, with a result
Cause = Literal["cancelled", "fenced", "shutdown", "stalled"]


class _Told(Frozen):
    pulse: Pulse


class Watch:
    """Watches one child on behalf of one claim. `cause` tells why it was stopped, if it was."""

    def __init__(
        self,
        place: Workplace,
        claim: Claim,
        child: ChildProcess,
        folder: Path,
        trace: TraceFile,
        stopping: Callable[[], bool],
    ) -> None:
        """Begin to watch.

        Args:
            place: the worker's side of the shared state.
            claim: on whose behalf.
            child: the job process.
            folder: of the attempt.
            trace: whose times count from now.
            stopping: whether the worker has been told to stop.
        """
        self._place = place
        self._folder, self._trace = folder, trace
        self.signs = VitalSigns(place, claim, child.pid, folder / "log.txt")
        self._claim = claim
        self._child = child
        self._stopping = stopping
        self._started = time.monotonic()
        self._renewed = self._looked = self._beaten = self._said = self._started
        self._kill_at: float | None = None
        self._blocks = BlockWatch(place, claim)
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
            self._beat(time.monotonic(), last=True)  # with the last words of the log
        finally:
            returncode = self._child.close()
        self._draw_end(returncode)
        return returncode

    def _draw_end(self, returncode: int) -> None:
        seconds = time.monotonic() - self._started
        args = {"worker": self._place.owner, "returncode": returncode, "cause": self.cause}
        self._trace.slice("supervised", "other", 0.0, seconds, depth=0, tid=WATCH_THREAD, args=args)
        if self.cause is not None or returncode not in WORDS_SAID:
            self._trace.instant(f"ended: {self.cause or 'fault'}", seconds, {**args, "at": self.signs.place_in_words()})

    def usage(self) -> Usage:
        """Return what this attempt took so far, measured."""
        seconds = round(time.monotonic() - self._started, 3)
        return Usage(seconds=seconds, peak_rss_bytes=self._child.peak_rss_bytes or None)

    def stack(self) -> str:
        """What a stalled process wrote of its stacks; empty when it could not even do that."""
        path = self._folder / STACKS
        return path.read_text(errors="replace")[:STACK_LENGTH] if path.exists() else ""

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._child.sample_memory()
            self._ask(now)
            self._beat(now)
            if self.signs.silence() > self.signs.limit_seconds:
                self._stop("stalled")
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

    def _beat(self, now: float, *, last: bool = False) -> None:
        settings = self._place.settings
        if self.cause == "fenced" or (now - self._beaten < settings.heartbeat_seconds and not last):
            return
        self._beaten = now
        beat = self.signs.heartbeat()
        counters = {"resident bytes": beat.rss_bytes, "tokens/s": beat.tokens_per_second or 0.0}
        for name, value in {**counters, "disk free bytes": beat.disk_free_bytes}.items():
            if value is not None:
                self._trace.counter(name, now - self._started, {name: float(value)})
        said = None
        if now - self._said >= settings.heartbeat_event_seconds:
            self._said, said = now, f"Heartbeat: {in_words(beat)}"
        try:
            held = self._place.leases.beat(self._claim.job_id, self._claim.fence, beat, said=said)
        except SQLAlchemyError as error:  # the next one tells more
            logger.warning("job %s: a heartbeat is lost: %s", self._claim.job_id, type(error).__name__)
            return
        if not held:
            self._stop("fenced")

    def _stop(self, cause: Cause) -> None:
        if cause == "fenced":
            self.cause = cause
            self._unsaid.clear()
            self._child.signal_group(signal.SIGKILL)
        elif cause == "stalled" and self.cause is None:
            self.cause = cause
            self._kill_at = time.monotonic() + DUMP_SECONDS
            if (self._folder / STACKS).exists():  # it has said that it knows this signal; others would die of it
                os.kill(self._child.pid, signal.SIGUSR1)
        elif self.cause is None:
            self.cause = cause
            self._kill_at = time.monotonic() + self._place.settings.cancel_grace_seconds
            self._child.signal_group(signal.SIGTERM)

    def _hear(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                if line.startswith(PULSE):
                    self.signs.hear(_Told.model_validate_json(line).pulse)
                    continue
                self.signs.hear(None)
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
            self._blocks.look(self._unsaid.popleft())
