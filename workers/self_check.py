"""A worker looks at itself before it takes work: what fails keeps it out of the queue. Imports no torch."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from api_schemas.errors import Unavailable
from api_schemas.workers import SelfCheck, Standing
from job_store.database import reading
from job_store.queue import depth
from job_store.workers import WorkerStore
from workers.child import SECRETS
from workers.workplace import Workplace

logger = logging.getLogger(__name__)

PROCESS = (sys.executable, "-m", "workers.self_check_process")
LIMIT_SECONDS = 90.0  # the check itself takes under 30 s; the rest is for a cold disk to import torch from
SLOW, VERY_SLOW = 0.9, 0.7  # of the class's median rate
SKEW_SECONDS = 1.0
SEEN_SECONDS = 15.0
CLOCKS = {
    "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
}


def check_worker(place: Workplace, name: str, *, command: Sequence[str] = PROCESS) -> tuple[str, Standing]:
    """Check this machine, keep what was found, and say whether the worker may take work.

    Args:
        place: the worker's side of the shared state.
        name: of the worker.
        command: starts the part that needs torch; the data folder and the setting `device` are added.

    Returns:
        The worker's id, and `failed` where one check failed.
    """
    store, started = WorkerStore(place.engine), time.monotonic()
    if place.settings.self_check == "skip":
        skipped = SelfCheck(name="self-check", result="skipped", detail="MODEPRESS_SELF_CHECK is skip")
        return store.add(name, "unknown", "unchecked", [skipped], 0.0), "unchecked"
    worker_class, checks = _measured(place, command)
    checks = [_compared(store, worker_class, check) for check in checks]
    checks += [_database(place), _broker(place)]
    failed = [check for check in checks if check.result == "fail"]
    for check in failed:
        logger.error("self-check: %s failed: %s", check.name, check.detail)
    standing: Standing = "failed" if failed else "ready"
    return store.add(name, worker_class, standing, checks, time.monotonic() - started), standing


def _measured(place: Workplace, command: Sequence[str]) -> tuple[str, list[SelfCheck]]:
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    environment["OMP_NUM_THREADS"] = str(place.settings.threads or os.cpu_count() or 1)
    try:
        done = subprocess.run(
            [*command, str(place.layout.home), place.settings.device],
            capture_output=True,
            text=True,
            env=environment,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"did not end within {LIMIT_SECONDS:g} s: a device, a disk or a library hangs"
        return "unknown", [SelfCheck(name="process", result="fail", detail=detail)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        detail = f"ended with status {done.returncode}: {last[:400]}"
        return "unknown", [SelfCheck(name="process", result="fail", detail=detail)]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["worker_class"], [SelfCheck.model_validate(check) for check in found["checks"]]


def _compared(store: WorkerStore, worker_class: str, check: SelfCheck) -> SelfCheck:
    """A rate beside the median of its class.

    A GPU far below its like is kept out. A processor is not: its neighbours share it, so that a low rate says what is
    going on, not what is broken.
    """
    if check.unit != "FLOP/s" or check.value is None:
        return check
    median = store.median(worker_class, check.name)
    if median is None:
        return check.model_copy(update={"detail": f"{check.detail}; too few others of this class to compare with"})
    share = check.value / median
    detail = f"{check.detail}; {share:.0%} of the median of its class"
    if share >= SLOW:
        return check.model_copy(update={"detail": detail})
    shared = worker_class.endswith(" threads")
    result = "fail" if share < VERY_SLOW and not shared else "warn"
    remedy = "look for other work on this processor" if shared else "look at clocks, temperature, power and other work"
    return check.model_copy(update={"result": result, "detail": f"{detail}: {remedy}"})


def _database(place: Workplace) -> SelfCheck:
    """The database answers, and its clock is ours: leases are compared across machines."""
    before = time.time()
    try:
        with reading(place.engine) as session:
            said = float(session.execute(text(CLOCKS[place.engine.dialect.name])).scalar_one())
    except SQLAlchemyError as error:
        detail = f"the database does not answer ({type(error).__name__}); see MODEPRESS_DATABASE_URL"
        return SelfCheck(name="database clock", result="fail", detail=detail)
    skew = said - (before + time.time()) / 2
    limit = place.settings.lease_seconds / 3
    result = "fail" if abs(skew) > limit else "warn" if abs(skew) > SKEW_SECONDS else "ok"
    detail = f"{place.engine.dialect.name} is {skew:+.3f} s from this machine's clock; set both by NTP"
    return SelfCheck(name="database clock", result=result, detail=detail, value=skew, unit="s")


def _broker(place: Workplace) -> SelfCheck:
    try:
        waiting = depth("compress", broker_url=place.settings.broker_url)
    except Unavailable as error:
        return SelfCheck(name="broker", result="fail", detail=error.message)
    return SelfCheck(name="broker", result="ok", detail=f"{waiting} messages wait")


class Presence(threading.Thread):
    """Says every 15 s that a worker is there."""

    def __init__(self, place: Workplace, worker_id: str) -> None:
        super().__init__(name="presence", daemon=True)
        self._store, self._worker_id = WorkerStore(place.engine), worker_id
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until `stop`; a database that is away is tried again."""
        while not self._stopping.wait(SEEN_SECONDS):
            self._say(stopped=False)

    def stop(self) -> None:
        """Say that the worker stops."""
        self._stopping.set()
        self._say(stopped=True)

    def _say(self, *, stopped: bool) -> None:
        try:
            self._store.seen(self._worker_id, stopped=stopped)
        except SQLAlchemyError as error:
            logger.warning("the database does not hear that this worker is there: %s", type(error).__name__)
