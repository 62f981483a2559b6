"""Looks at the time of each finished block: slow ones, and workers slow in a row, are said in the job's events."""

import logging

from sqlalchemy.exc import SQLAlchemyError

from api_schemas.events import ProgressEvent
from job_store.block_times import IN_A_ROW, BlockTimes, Judged
from job_store.leases import Claim
from workers.workplace import Workplace

logger = logging.getLogger(__name__)


class BlockWatch:
    """Judges the blocks of one claim."""

    def __init__(self, place: Workplace, claim: Claim) -> None:
        """Begin with the next block."""
        self._place, self._claim = place, claim
        self._times = BlockTimes(place.engine)

    def look(self, event: ProgressEvent) -> None:
        """Judge the block that an event tells of, if it tells of one that was solved."""
        kind, seconds = event.data.get("kind"), event.data.get("seconds")
        if not isinstance(kind, str) or not isinstance(seconds, float) or event.block is None:
            return
        try:
            judged = self._times.judge(
                kind, seconds, job_id=self._claim.job_id, block=event.block, worker_id=self._place.worker_id
            )
            if judged.slow:
                self._say(event.block, kind, judged)
        except SQLAlchemyError as error:  # a time that is not compared harms nobody
            logger.warning("job %s: a block's time is not judged: %s", self._claim.job_id, type(error).__name__)

    def _say(self, block: int, kind: str, judged: Judged) -> None:
        message = f"Block {block + 1} was slow: {judged.seconds:.3g} s, where the median is {judged.median:.3g} s"
        if judged.straggler:
            message += f"; {IN_A_ROW} in a row: this worker is a straggler, look at its machine (modepress workers)"
        data = {"seconds": judged.seconds, "median": judged.median, "kind": kind, "straggler": judged.straggler}
        self._place.leases.note(self._claim.job_id, self._claim.fence, message, level="warn", data=data)
