"""What `/metrics` shows. One registry per app; the state of jobs is read from the database at each scrape."""

import time
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func, select

from api_schemas.jobs import JobStatus
from job_store.database import reading
from job_store.tables import JobRow

SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class Metrics:
    """Counters of this API process, and the jobs of the whole service."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "http_requests", "requests answered", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "http_request_seconds",
            "from the first byte in to the last byte out",
            ("method", "route"),
            registry=self.registry,
            buckets=SECONDS,
        )
        self.upload_bytes = Counter("modepress_upload_bytes", "bytes of files and parts stored", registry=self.registry)
        self.registry.register(_Jobs(engine))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Jobs(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # registering must not touch a database that is not there yet

    def collect(self) -> Iterator[Metric]:
        with reading(self._engine) as session:
            counts = dict(session.execute(select(JobRow.status, func.count()).group_by(JobRow.status)).tuples().all())
            oldest = session.scalar(select(func.min(JobRow.created_at)).where(JobRow.status == "queued"))
        jobs = GaugeMetricFamily("modepress_jobs", "jobs by status", labels=("status",))
        for status in get_args(JobStatus):
            jobs.add_metric((status,), counts.get(status, 0))
        yield jobs
        yield GaugeMetricFamily("modepress_queue_depth", "jobs that wait for a worker", value=counts.get("queued", 0))
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        yield GaugeMetricFamily("modepress_queue_oldest_seconds", "age of the oldest waiting job", value=age)
