"""What every task of a worker needs: settings, database, folders. Opened once per process, after the fork."""

import os
import socket
import uuid
from dataclasses import dataclass, field, replace
from functools import lru_cache

from sqlalchemy import Engine

from job_store.database import make_engine, upgrade
from job_store.layout import Layout
from job_store.leases import LeaseStore
from job_store.settings import Settings

WORKER_ID = "MODEPRESS_WORKER_ID"  # set by a worker's main process for those that it forks


def _owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Workplace:
    """The worker's side of the service's shared state."""

    settings: Settings
    engine: Engine
    layout: Layout
    leases: LeaseStore
    owner: str = field(default_factory=_owner)
    worker_id: str | None = None


def open_workplace(settings: Settings) -> Workplace:
    """Open the database and the data folder of some settings, creating what is missing."""
    layout = Layout(settings.resolved_home).prepare()
    engine = make_engine(settings.resolved_database_url)
    upgrade(engine)
    return Workplace(settings, engine, layout, LeaseStore(engine, max_attempts=settings.max_attempts))


@lru_cache(maxsize=1)
def workplace() -> Workplace:
    """Return this process's workplace, from the environment."""
    return replace(open_workplace(Settings()), worker_id=os.environ.get(WORKER_ID))
