"""The workers that were started, what they found of themselves, and the rates that others of their class had."""

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from typing import cast

from sqlalchemy import Engine, delete, select, update

from api_schemas.workers import SelfCheck, Standing, Worker
from job_store.database import reading, writing
from job_store.tables import WorkerRow

ALIVE_SECONDS = 60.0
COMPARED, FEWEST = 50, 5  # of the class's latest sound workers; below the fewest nothing is compared
KEPT = 1000


class WorkerStore:
    """The workers of one database."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def add(self, name: str, worker_class: str, standing: Standing, checks: Sequence[SelfCheck], seconds: float) -> str:
        """Keep what a starting worker found, and return its id; of all workers the latest 1000 are kept."""
        now, worker_id = self._clock(), f"worker-{uuid.uuid4().hex[:24]}"
        row = WorkerRow(
            id=worker_id,
            name=name[:256],
            worker_class=worker_class[:256],
            started_at=now,
            seen_at=now,
            standing=standing,
            slow_blocks=0,
            checks={"checks": [check.model_dump(mode="json") for check in checks]},
            seconds=seconds,
        )
        with writing(self._engine) as session:
            session.add(row)
            session.flush()
            newest = select(WorkerRow.id).order_by(WorkerRow.started_at.desc()).limit(KEPT)
            session.execute(delete(WorkerRow).where(WorkerRow.id.not_in(newest)))
        return worker_id

    def seen(self, worker_id: str, *, stopped: bool = False) -> None:
        """It is there still, or stops now."""
        now = self._clock()
        values = {"seen_at": now, **({"stopped_at": now} if stopped else {})}
        with writing(self._engine) as session:
            session.execute(update(WorkerRow).where(WorkerRow.id == worker_id).values(**values))

    def list(self, limit: int = 100) -> list[Worker]:
        """The latest workers, newest first."""
        with reading(self._engine) as session:
            rows = session.scalars(select(WorkerRow).order_by(WorkerRow.started_at.desc()).limit(limit)).all()
            return [self._view(row) for row in rows]

    def median(self, worker_class: str, check: str) -> float | None:
        """The median of a rate over the latest sound workers of a class; None while there are too few."""
        sound = (WorkerRow.worker_class == worker_class, WorkerRow.standing == "ready")
        latest = select(WorkerRow.checks).where(*sound).order_by(WorkerRow.started_at.desc()).limit(COMPARED)
        with reading(self._engine) as session:
            found = session.scalars(latest).all()
        values = [
            one["value"]
            for checks in found
            for one in checks["checks"]
            if one["name"] == check and one["value"] is not None
        ]
        return statistics.median(values) if len(values) >= FEWEST else None

    def _view(self, row: WorkerRow) -> Worker:
        return Worker(
            id=row.id,
            name=row.name,
            worker_class=row.worker_class,
            started_at=int(row.started_at),
            seen_at=int(row.seen_at),
            alive=row.stopped_at is None and self._clock() - row.seen_at < ALIVE_SECONDS,
            standing=cast(Standing, row.standing),
            slow_blocks=row.slow_blocks,
            checks=tuple(SelfCheck.model_validate(check) for check in row.checks["checks"]),
            seconds=row.seconds,
        )
