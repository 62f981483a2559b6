"""How long blocks took, and which were slow: rolling medians per kind of block and class of worker.

A block is slow when its time is more than the larger of the median absolute deviation and 10 % of the median above the
median. Reference: the outlier rule of Megatron-LM's gpu_sniff_test.py.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from job_store.database import writing
from job_store.tables import BlockTimeRow, WorkerRow

WINDOW, FEWEST = 101, 5  # of the latest blocks of one kind; below the fewest nothing is called slow
SHARE = 0.1
IN_A_ROW = 3  # slow blocks that make a worker a straggler, where its peers' latest are not slow as well


@dataclass(frozen=True)
class Judged:
    """A block's time beside those of its kind."""

    seconds: float
    median: float | None
    slow: bool
    straggler: bool


def is_slow(seconds: float, before: Sequence[float]) -> bool:
    """The stated rule; False while there are too few to compare with."""
    if len(before) < FEWEST:
        return False
    median = statistics.median(before)
    deviation = statistics.median(abs(one - median) for one in before)
    return seconds - median > max(deviation, SHARE * median)


class BlockTimes:
    """The times of one database."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def judge(self, kind: str, seconds: float, *, job_id: str, block: int, worker_id: str | None) -> Judged:
        """Compare a block with the latest of its kind on workers of this class, then keep it among them.

        Args:
            kind: what has the same time on equal workers.
            seconds: that the block took.
            job_id: whose it is.
            block: its index.
            worker_id: who computed it; None where no worker is known, as in tests of a supervisor alone.
        """
        kind = kind[:400]
        with writing(self._engine) as session:
            worker = None if worker_id is None else session.get(WorkerRow, worker_id)
            worker_class = "unknown" if worker is None else worker.worker_class
            same = (BlockTimeRow.worker_class == worker_class, BlockTimeRow.kind == kind)
            latest = select(BlockTimeRow).where(*same).order_by(BlockTimeRow.id.desc()).limit(WINDOW)
            rows = session.scalars(latest).all()
            before = [row.seconds for row in rows]
            slow = is_slow(seconds, before)
            straggler = False
            if worker is not None:
                worker.slow_blocks = worker.slow_blocks + 1 if slow else 0
                peers = [row.slow for row in rows if row.worker_id != worker_id][:IN_A_ROW]
                straggler = worker.slow_blocks == IN_A_ROW and not (len(peers) == IN_A_ROW and all(peers))
            session.add(
                BlockTimeRow(
                    at=self._clock(),
                    job_id=job_id,
                    block=block,
                    worker_id=worker_id,
                    worker_class=worker_class,
                    kind=kind,
                    seconds=seconds,
                    slow=slow,
                )
            )
            self._forget(session, rows)
        return Judged(seconds, statistics.median(before) if len(before) >= FEWEST else None, slow, straggler)

    @staticmethod
    def _forget(session: Session, rows: Sequence[BlockTimeRow]) -> None:
        if len(rows) == WINDOW:
            oldest = rows[-1]
            same = (BlockTimeRow.worker_class == oldest.worker_class, BlockTimeRow.kind == oldest.kind)
            session.execute(delete(BlockTimeRow).where(*same, BlockTimeRow.id <= oldest.id))
