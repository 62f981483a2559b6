"""A live service without its API: Redis, one Celery worker, a reaper, and a tiny real model to compress."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api_schemas.jobs import TERMINAL, Job, JobRequest
from job_store.database import reading, writing
from job_store.jobs import JobStore
from job_store.queue import enqueue
from job_store.reaper import Reaper
from job_store.settings import Settings
from job_store.tables import ModelRow
from tests.servers import Redis, Worker, celery_worker, redis_server, wait_until
from workers.workplace import Workplace, open_workplace

BLOCKS = 6
JOB_SECONDS = 120.0
RECIPE = {
    "steps": [{"method": "modegpt", "sparsity": 0.25, "modules": ["mlp"], "round_to": 8}],
    "calibration": {"source": "builtin", "num_samples": 8, "sequence_length": 64},
    "evaluation": {"source": "builtin", "num_windows": 2, "sequence_length": 64, "generation_tokens": 0},
}


@dataclass
class Live:
    """What a test needs to submit jobs and to hurt the service."""

    settings: Settings
    place: Workplace
    jobs: JobStore
    redis: Redis
    worker: Worker

    def submit(self, model: str = "tiny", **changes: Any) -> str:
        """Create and send a job as the API does; returns its id."""
        request = JobRequest.model_validate({"model": model, "recipe": {**RECIPE, **changes}})
        job, _ = self.jobs.create(request, recipe_hash="0" * 64)
        enqueue(job.id, "compress", broker_url=self.redis.url)
        return job.id

    def ended(self, job_id: str) -> Job:
        """Wait for a job to end."""
        return wait_until(lambda: self._terminal(job_id), seconds=JOB_SECONDS, what=f"the end of {job_id}")

    def _terminal(self, job_id: str) -> Job | None:
        job = self.jobs.get(job_id)
        return job if job.status in TERMINAL else None

    def until_block(self, job_id: str, count: int) -> None:
        """Wait until `count` blocks of a job are durable; fails when the job is past its blocks already."""
        deadline = time.monotonic() + JOB_SECONDS
        while self.durable_blocks(job_id) < count:
            assert time.monotonic() < deadline, self.messages(job_id)
            assert self.jobs.get(job_id).status not in TERMINAL, self.jobs.get(job_id)
            time.sleep(0.002)

    def durable_blocks(self, job_id: str) -> int:
        """How many finished blocks lie in a job's folder."""
        return len(list(self.place.layout.blocks(job_id).glob("*/block-*.json")))

    def messages(self, job_id: str) -> list[str]:
        """What the events of a job say."""
        return [event.message for event in self.jobs.events(job_id, after=0, limit=1000).data]

    def artifact(self, job: Job) -> dict[str, str]:
        """The SHA-256 of every file of a job's artifact."""
        assert job.status == "succeeded", (job.error, self.messages(job.id))
        assert job.compressed_model is not None
        with reading(self.place.engine) as session:
            row = session.get_one(ModelRow, job.compressed_model)
            assert (row.status, row.parent, row.job) == ("ready", "tiny", job.id)
        return digests(Path(row.path))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables of a worker."""
    given = {f"MODEPRESS_{name.upper()}": str(getattr(settings, name)) for name in settings.model_fields_set}
    return {**given, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def live_settings(folder: Path, broker_url: str, **changes: Any) -> Settings:
    """Settings whose leases are short enough for a test to wait for."""
    values = {
        "home": folder / "home",
        "broker_url": broker_url,
        "lease_seconds": 3.0,
        "renew_seconds": 1.0,
        "reaper_seconds": 1.0,
        "cancel_grace_seconds": 2.0,
        "threads": 1,
        **changes,
    }
    return Settings(**values)


@contextmanager
def live_service(folder: Path, model: Path, **changes: Any) -> Iterator[Live]:
    """Run Redis, a worker and a reaper in `folder` while the body runs."""
    with redis_server() as redis:
        settings = live_settings(folder, redis.url, **changes)
        place = open_workplace(settings)
        add_model(place, "tiny", model)
        reaper = Reaper(place.engine, settings)
        reaper.start()
        try:
            with celery_worker(environment(settings), folder / "worker.log") as worker:
                yield Live(settings, place, JobStore(place.engine), redis, worker)
        finally:
            reaper.stop()
            place.engine.dispose()


def add_model(place: Workplace, model_id: str, folder: Path) -> None:
    """Register a folder without looking at it."""
    row = ModelRow(id=model_id, created_at=0.0, status="ready", origin="path", path=str(folder), request={})
    with writing(place.engine) as session:
        session.add(row)
