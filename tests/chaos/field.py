"""The service as it is hurt: Redis, two workers, an API (whose reaper repairs), a database, and a tiny model."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from api_schemas.events import JobEvent
from job_store.jobs import JobStore
from job_store.settings import Settings
from modepress.ports import port_to_use
from tests.servers import REPOSITORY, Redis, Worker, celery_worker, redis_server, runs_module, wait_until
from tests.tiny_models import make_tiny_model
from tests.workers.live import BLOCKS, Live, add_model, environment, live_settings
from workers.workplace import open_workplace

API_COMMAND = (sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", "--host", "127.0.0.1")
API_SECONDS = 60.0


@dataclass
class Api:
    """The API as a process; it can be killed and started again on the same port."""

    environment: dict[str, str]
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*API_COMMAND, "--port", str(self.port)],
                env={**os.environ, **self.environment},
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_until(self.alive, seconds=API_SECONDS, what=f"the API (see {self.log})")

    def alive(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/healthz", timeout=2.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it without a chance to say anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@dataclass
class Field(Live):
    """What a fault may touch."""

    second: Worker = field(kw_only=True)
    api: Api = field(kw_only=True)

    def process_of(self, job_id: str) -> psutil.Process | None:
        """The process that works on a job now."""
        for worker in (self.worker, self.second):
            for child in worker.descendants():
                if runs_module(child, "workers.job_process") and any(job_id in word for word in _words(child)):
                    return child
        return None

    def worker_of(self, job_id: str) -> Worker:
        """The worker below which a job's process runs; the first one when there is none."""
        process = self.process_of(job_id)
        below = process is not None and process.pid in {child.pid for child in self.second.descendants()}
        return self.second if below else self.worker

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """The events of a job after a sequence number."""
        return list(self.jobs.events(job_id, after=after, limit=1000).data)

    def moved(self, job_id: str, after: int) -> JobEvent | None:
        """The first event after a sequence number that a job process sent."""
        return next((event for event in self.events(job_id, after) if "percent" in event.data), None)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@contextmanager
def field_of(folder: Path, **changes: Any) -> Iterator[Field]:
    """Run everything in `folder` while the body runs.

    Args:
        folder: empty.
        changes: settings; `database_url` makes it the production shape.
    """
    model = make_tiny_model(folder / "model", layers=BLOCKS, hidden=128, intermediate=512)
    with ExitStack() as stack:
        redis: Redis = stack.enter_context(redis_server())
        # more attempts than faults hit one job: what is counted here is recovery, not the limit
        settings: Settings = live_settings(folder, redis.url, auth="none", max_attempts=9, **changes)
        place = open_workplace(settings)
        stack.callback(place.engine.dispose)
        add_model(place, "tiny", model)
        variables = {**environment(settings), "MODEPRESS_SELF_CHECK": "skip"}
        api = Api(variables, port_to_use("127.0.0.1", 0), folder / "api.log")
        api.start()
        stack.callback(api.kill)
        first, second = (
            stack.enter_context(celery_worker(variables, folder / f"worker-{number}.log")) for number in (1, 2)
        )
        yield Field(settings, place, JobStore(place.engine), redis, first, second=second, api=api)


def pause(seconds: float) -> None:
    """Let time pass for everybody."""
    time.sleep(seconds)
