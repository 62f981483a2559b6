"""The faults: what is done to the service while a job runs. Each leaves the service as a host's supervisor would.

What ends is started again at once, as `modepress up`, Docker or systemd do; what recovers the job is ours.
"""

import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import text

from job_store.queue import enqueue
from tests.chaos.field import Field, pause

REDIS_AWAY_SECONDS = 4.0


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: for the table.
        strike: hurts the service while the job of this id runs.
        shape: the shape it belongs to; None is both.
    """

    name: str
    strike: Callable[[Field, str, random.Random], None]
    shape: str | None = None


def _kill_job_process(field: Field, job_id: str, _chance: random.Random) -> None:
    process = field.process_of(job_id)
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _kill_supervisor(field: Field, job_id: str, _chance: random.Random) -> None:
    process = field.process_of(job_id)
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            supervisor = process.parent()
            if supervisor is not None:
                supervisor.kill()


def _kill_worker(field: Field, job_id: str, _chance: random.Random) -> None:
    worker = field.worker_of(job_id)
    worker.kill()
    worker.start()


def _kill_every_worker(field: Field, _job_id: str, _chance: random.Random) -> None:
    for worker in (field.worker, field.second):
        worker.kill()
    for worker in (field.worker, field.second):
        worker.start()


def _kill_api(field: Field, _job_id: str, _chance: random.Random) -> None:
    field.api.kill()
    field.api.start()


def _kill_worker_and_api(field: Field, job_id: str, chance: random.Random) -> None:
    field.api.kill()
    _kill_worker(field, job_id, chance)
    field.api.start()


def _kill_redis(field: Field, _job_id: str, _chance: random.Random) -> None:
    field.redis.kill()
    field.redis.start()


def _redis_forgets(field: Field, _job_id: str, _chance: random.Random) -> None:
    """As a Redis without its append-only file would, after a restart."""
    field.redis.kill()
    folder = Path(field.redis.server.command[-1]).parent
    for kept in folder.iterdir():
        if kept.is_dir():
            shutil.rmtree(kept)
        elif kept.suffix != ".conf":
            kept.unlink()
    field.redis.start()


def _redis_away(field: Field, _job_id: str, _chance: random.Random) -> None:
    field.redis.kill()
    pause(REDIS_AWAY_SECONDS)
    field.redis.start()


def _deliver_again(field: Field, job_id: str, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 4)):
        enqueue(job_id, "compress", broker_url=field.redis.url)


def _freeze_past_the_lease(field: Field, job_id: str, _chance: random.Random) -> None:
    """The job process and its supervisor sleep longer than their lease; somebody else takes the job; then they wake."""
    process = field.process_of(job_id)
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        supervisor = process.parent()
        frozen = [one for one in (supervisor, process) if one is not None]
        for one in frozen:
            one.send_signal(signal.SIGSTOP)
        pause(field.settings.lease_seconds + 2 * field.settings.reaper_seconds)
        for one in frozen:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGCONT)


def _freeze_within_the_lease(field: Field, job_id: str, chance: random.Random) -> None:
    process = field.process_of(job_id)
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
            pause(chance.uniform(0.1, field.settings.lease_seconds / 2))
            process.send_signal(signal.SIGCONT)


def _corrupt_a_block(field: Field, job_id: str, chance: random.Random) -> None:
    """A finished block's bytes change on the disk, and the process that would not have read it again is killed."""
    _kill_job_process(field, job_id, chance)
    blocks = sorted(field.place.layout.blocks(job_id).glob("*/block-*.safetensors"))
    if blocks:
        victim = chance.choice(blocks)
        with suppress(FileNotFoundError):  # the job may have ended meanwhile
            content = bytearray(victim.read_bytes())
            content[chance.randrange(len(content))] ^= 0xFF
            victim.write_bytes(content)


def _cut_connections(field: Field, _job_id: str, _chance: random.Random) -> None:
    """Every session of the database ends, as at a restart of PostgreSQL."""
    with field.place.engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )


FAULTS = (
    Fault("job process killed", _kill_job_process),
    Fault("supervisor killed", _kill_supervisor),
    Fault("worker killed", _kill_worker),
    Fault("all workers killed", _kill_every_worker),
    Fault("API killed", _kill_api),
    Fault("worker and API killed", _kill_worker_and_api),
    Fault("Redis killed", _kill_redis),
    Fault("Redis lost its data", _redis_forgets),
    Fault("Redis away for 4 s", _redis_away),
    Fault("message delivered again", _deliver_again),
    Fault("frozen past the lease", _freeze_past_the_lease),
    Fault("frozen within the lease", _freeze_within_the_lease),
    Fault("finished block corrupted", _corrupt_a_block),
    Fault("database connections cut", _cut_connections, shape="postgresql"),
)
