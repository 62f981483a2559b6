"""The repairer: re-queues jobs of silent workers, re-sends lost messages, sweeps what ended jobs left behind."""

import logging
import threading

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from api_schemas.errors import Unavailable
from job_store.database import reading
from job_store.layout import Layout
from job_store.leases import LeaseStore
from job_store.leftovers import sweep
from job_store.queue import depth, enqueue
from job_store.settings import Settings
from job_store.tables import ModelRow

logger = logging.getLogger(__name__)


class Reaper(threading.Thread):
    """A thread of the API process. Several may run at once: each step is a transaction, each message may be doubled."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        super().__init__(name="reaper", daemon=True)
        self._engine = engine
        self._settings = settings
        self._leases = LeaseStore(engine, max_attempts=settings.max_attempts)
        self._layout = Layout(settings.resolved_home)
        self._stopping = threading.Event()
        self.failures = 0

    def run(self) -> None:
        """Repair every `reaper_seconds` until `stop`. A broker or database that is away is tried again."""
        while not self._stopping.wait(self._settings.reaper_seconds):
            try:
                self.repair()
            except Unavailable as error:
                self._count_failure(error.message)
            except (SQLAlchemyError, OSError) as error:
                self._count_failure(type(error).__name__)

    def stop(self) -> None:
        """Ask the thread to end and wait for it."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def repair(self) -> None:
        """Do one round.

        Raises:
            Unavailable: the broker is away; what was re-queued waits for a later round.
        """
        for job_id in self._leases.reap():
            logger.warning("job re-queued after its worker went silent: %s", job_id)
            self._send(job_id, "compress")
        sweep(self._engine, self._layout)
        # A waiting job whose queue is empty has lost its message; while the queue holds any, nothing is re-sent, so
        # that hours of waiting do not pile up messages.
        if depth("compress", broker_url=self._settings.broker_url) == 0:
            for job_id in self._leases.overdue(self._settings.lease_seconds):
                self._send(job_id, "compress")
        downloading = self._downloading()
        if downloading and depth("fetch_model", broker_url=self._settings.broker_url) == 0:
            for model_id in downloading:
                self._send(model_id, "fetch_model")

    def _count_failure(self, reason: str) -> None:
        self.failures += 1
        logger.warning("repair will be tried again in %g s: %s", self._settings.reaper_seconds, reason)

    def _send(self, object_id: str, kind: str) -> None:
        enqueue(object_id, kind, broker_url=self._settings.broker_url)

    def _downloading(self) -> list[str]:
        with reading(self._engine) as session:
            return list(session.scalars(select(ModelRow.id).where(ModelRow.status == "downloading").limit(100)))
