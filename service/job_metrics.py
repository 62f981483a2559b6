"""Metrics of jobs and workers, read from the database at each scrape: every API process shows the same."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine, Row, func, select
from sqlalchemy.orm import Session

from api_schemas.jobs import JobStatus
from api_schemas.workers import Standing
from job_store.block_times import IN_A_ROW
from job_store.database import reading
from job_store.settings import Settings
from job_store.tables import BlockTimeRow, JobRow, UploadRow, WorkerRow
from job_store.workers import ALIVE_SECONDS

QUANTILES = (0.5, 0.9)
RATES = {
    "tokens_per_second": "tokens through a block, of all running jobs",
    "flops_per_second": "operations of forward passes, of all running jobs",
}


class JobMetrics(Collector):
    """Queue, leases, heartbeats, attempts, blocks, workers, uploads."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Read from this database; nothing is read before the first scrape."""
        self._engine, self._settings = engine, settings

    def describe(self) -> list[Metric]:
        """Nothing: registering must not touch a database that is not there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read everything in one session."""
        now = time.time()
        with reading(self._engine) as session:
            yield from self._queue(session, now)
            yield from self._running(session, now)
            yield from _blocks(session)
            yield from _workers(session, now)
            uploads = session.execute(select(UploadRow.status, func.count()).group_by(UploadRow.status)).all()
            family = GaugeMetricFamily("modepress_uploads", "resumable uploads by status", labels=("status",))
            for status, count in uploads:
                family.add_metric((status,), count)
            yield family

    def _queue(self, session: Session, now: float) -> Iterator[Metric]:
        counts = _counts(session, select(JobRow.status, func.count()).group_by(JobRow.status))
        oldest = session.scalar(select(func.min(JobRow.created_at)).where(JobRow.status == "queued"))
        attempts = session.scalar(select(func.sum(JobRow.attempt)))
        jobs = GaugeMetricFamily("modepress_jobs", "jobs by status", labels=("status",))
        for status in get_args(JobStatus):
            jobs.add_metric((status,), counts.get(status, 0))
        yield jobs
        yield GaugeMetricFamily("modepress_queue_depth", "jobs that wait for a worker", value=counts.get("queued", 0))
        age = 0.0 if oldest is None else max(0.0, now - oldest)
        yield GaugeMetricFamily("modepress_queue_oldest_seconds", "age of the oldest waiting job", value=age)
        yield CounterMetricFamily("modepress_attempts", "attempts at all jobs", value=attempts or 0)

    def _running(self, session: Session, now: float) -> Iterator[Metric]:
        columns = select(JobRow.lease_until, JobRow.attempt, JobRow.heartbeat)
        rows = session.execute(columns.where(JobRow.status.in_(("running", "cancelling")))).all()
        beats: list[dict[str, Any]] = [row.heartbeat for row in rows if row.heartbeat is not None]
        lease = self._settings.lease_seconds
        yield _oldest("modepress_lease_age_seconds", "since a running job's lease was renewed, the longest",
                      [now - (row.lease_until - lease) for row in rows])  # fmt: skip
        yield _oldest("modepress_heartbeat_age_seconds", "since a running job's heartbeat, the longest",
                      [now - beat["at"] for beat in beats])  # fmt: skip
        yield _oldest("modepress_progress_age_seconds", "since a running job moved, by its heartbeat, the longest",
                      [beat["progress_age_seconds"] for beat in beats])  # fmt: skip
        yield _oldest("modepress_attempt", "number of a running job's attempt, the highest", _attempts(rows))
        for name, text in RATES.items():
            total = sum(beat[name] or 0.0 for beat in beats)
            yield GaugeMetricFamily(f"modepress_{name}", text, value=total)
        known = [beat["mfu"] for beat in beats if beat["mfu"] is not None]
        family = GaugeMetricFamily("modepress_mfu", "of running jobs, the lowest; absent where no peak is stated")
        if known:
            family.add_metric((), min(known))
        yield family


def _counts(session: Session, grouped: Any) -> dict[str, int]:
    return {row[0]: row[1] for row in session.execute(grouped)}


def _attempts(rows: Sequence[Row[Any]]) -> list[float]:
    return [float(row.attempt) for row in rows]


def _oldest(name: str, text: str, values: list[float]) -> Metric:
    return GaugeMetricFamily(name, text, value=max([0.0, *values]))


def _blocks(session: Session) -> Iterator[Metric]:
    """Seconds of the latest blocks by method: of each kind and class of worker the last 101 are kept."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for kind, value in session.execute(select(BlockTimeRow.kind, BlockTimeRow.seconds)).all():
        seconds[kind.partition(",")[0]].append(value)
    slow = session.scalar(select(func.count()).where(BlockTimeRow.slow))
    family = GaugeMetricFamily("modepress_block_seconds", "of the latest blocks", labels=("method", "quantile"))
    for method, values in sorted(seconds.items()):
        for quantile in QUANTILES:
            family.add_metric((method, str(quantile)), _quantile(values, quantile))
    yield family
    yield GaugeMetricFamily("modepress_slow_blocks", "of the latest blocks, those that were slow", value=slow or 0)


def _quantile(values: list[float], quantile: float) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(quantile * 100) - 1]


def _workers(session: Session, now: float) -> Iterator[Metric]:
    alive = (WorkerRow.stopped_at.is_(None), WorkerRow.seen_at > now - ALIVE_SECONDS)
    grouped = select(WorkerRow.standing, func.count()).where(*alive).group_by(WorkerRow.standing)
    counts = _counts(session, grouped)
    family = GaugeMetricFamily("modepress_workers", "workers alive by their self-check", labels=("standing",))
    for standing in get_args(Standing):
        family.add_metric((standing,), counts.get(standing, 0))
    yield family
    stragglers = session.scalar(select(func.count()).where(*alive, WorkerRow.slow_blocks >= IN_A_ROW))
    yield GaugeMetricFamily("modepress_stragglers", "workers slow for three blocks in a row", value=stragglers or 0)
