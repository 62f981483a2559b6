"""One fault after the other, each at a random moment of a job of its own; what became of the job is counted.

recovered   the job succeeded, and its artifact has the undisturbed one's bytes
wrong       it succeeded with other bytes
lost        it ended otherwise
stuck       it did not end in time
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from api_schemas.jobs import TERMINAL, Job
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.field import Field, pause
from tests.workers.live import BLOCKS

STUCK_SECONDS = 150.0
LATEST_SECONDS = 2.0  # after the last block: the artifact is written, reloaded, measured


@dataclass(frozen=True)
class Outcome:
    """What a fault did.

    Attributes:
        fault: its name.
        moment: when it struck, in words.
        verdict: `recovered`, `wrong`, `lost` or `stuck`.
        status: of the job.
        attempts: that the job took.
        recovery_seconds: from the strike's end until the job moved again; 0 where it had nothing left to do.
    """

    fault: str
    moment: str
    verdict: str
    status: str
    attempts: int
    recovery_seconds: float

    def row(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def chosen(count: int, shape: str, chance: random.Random) -> list[Fault]:
    """So many faults of a shape, every kind as often as every other up to one, in random order."""
    kinds = [fault for fault in FAULTS if fault.shape in (None, shape)]
    rounds = [chance.sample(kinds, len(kinds)) for _ in range(-(-count // len(kinds)))]
    return [fault for one in rounds for fault in one][:count]


def campaign(
    field: Field, undisturbed: dict[str, str], faults: Sequence[Fault], chance: random.Random, deadline: float
) -> Iterator[Outcome]:
    """Strike once for each fault, until the monotonic clock shows `deadline`."""
    for fault in faults:
        if time.monotonic() > deadline:
            return
        yield _strike(field, undisturbed, fault, chance)


def _strike(field: Field, undisturbed: dict[str, str], fault: Fault, chance: random.Random) -> Outcome:
    job_id = field.submit()
    moment = _wait_for_a_moment(field, job_id, chance)
    fault.strike(field, job_id, chance)
    struck, seen = time.monotonic(), max((event.sequence for event in field.events(job_id)), default=0)
    moved: float | None = None
    while time.monotonic() < struck + STUCK_SECONDS:
        job = field.jobs.get(job_id)
        if moved is None and field.moved(job_id, seen) is not None:
            moved = time.monotonic() - struck
        if job.status in TERMINAL:
            verdict = _verdict(field, job, undisturbed)
            return Outcome(fault.name, moment, verdict, job.status, job.attempt, round(moved or 0.0, 2))
        pause(0.05)
    return Outcome(fault.name, moment, "stuck", job.status, job.attempt, STUCK_SECONDS)


def _wait_for_a_moment(field: Field, job_id: str, chance: random.Random) -> str:
    """Let the job come as far as a random block, or beyond the last one; says how far."""
    blocks = chance.randint(0, BLOCKS)
    if blocks:
        field.until_block(job_id, blocks)
    else:
        pause(chance.uniform(0.0, LATEST_SECONDS))
        return "before the first block"
    if blocks == BLOCKS:
        pause(chance.uniform(0.0, LATEST_SECONDS))
        return "after the last block"
    return f"after block {blocks}"


def _verdict(field: Field, job: Job, undisturbed: dict[str, str]) -> str:
    if job.status != "succeeded":
        return "lost"
    return "recovered" if field.artifact(job) == undisturbed else "wrong"
