"""What `/metrics` shows. One registry per app; the state of jobs is read from the database at each scrape."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from sqlalchemy import Engine

from job_store.settings import Settings
from service.job_metrics import JobMetrics

SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class Metrics:
    """Counters of this API process, and the jobs of the whole service."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
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
        self.registry.register(JobMetrics(engine, settings))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
