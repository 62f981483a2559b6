"""The Celery application: settings only. It carries ids; the database owns the jobs."""

import logging
import os
from typing import Any

from celery import Celery
from celery.signals import (
    celeryd_after_setup,
    setup_logging,
    worker_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from sqlalchemy.exc import SQLAlchemyError

from job_store import json_logs
from job_store.broker import REDIS_OPTIONS, VISIBILITY_SECONDS, broker_options
from job_store.queue import QUEUES
from job_store.settings import Settings
from workers import shutdown
from workers.self_check import Presence, check_worker
from workers.workplace import WORKER_ID, open_workplace

logger = logging.getLogger(__name__)

SETTINGS = Settings()
_worker_id: str | None = None  # of this process, once it has looked at itself
_presence: Presence | None = None

app = Celery("workers", include=["workers.tasks"])
app.conf.update(
    task_queues=QUEUES,
    task_default_queue=QUEUES[0].name,
    task_create_missing_queues=False,  # a mistyped queue name fails instead of making a queue that nobody reads
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_track_started=True,
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],  # a worker that accepts pickle runs whatever it is sent
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_soft_shutdown_timeout=60,
    worker_redirect_stdouts=False,
    worker_send_task_events=True,
    task_send_sent_event=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    visibility_timeout=VISIBILITY_SECONDS,
    result_backend_transport_options={"visibility_timeout": REDIS_OPTIONS["visibility_timeout"]},
    broker_url=SETTINGS.broker_url,
)
if SETTINGS.broker_url is not None:
    app.conf.update(broker_options(SETTINGS.broker_url))


@setup_logging.connect
def _configure_logs(**_: Any) -> None:
    json_logs.configure(SETTINGS.log_level)


@worker_init.connect
def _refuse_without_broker(**_: Any) -> None:
    if SETTINGS.broker_url is None:
        raise SystemExit("MODEPRESS_BROKER_URL is not set; set it to redis://… or start with `modepress up`")


@celeryd_after_setup.connect
def _look_at_oneself(sender: str, instance: Any, **_: Any) -> None:
    """Before the first message is asked for, and before the pool is forked: no connection may survive a fork."""
    global _worker_id
    try:
        place = open_workplace(SETTINGS)
        _worker_id, standing = check_worker(place, sender)
        os.environ[WORKER_ID] = _worker_id
        place.engine.dispose()
    except (SQLAlchemyError, OSError, ValueError) as error:  # Celery would log it and go on, unchecked
        raise SystemExit(f"the self-check could not be made ({type(error).__name__}: {error})") from error
    if standing == "failed":
        logger.error("self-check failed: this worker takes no work; mend what is named above, then start it again")
        instance.app.amqp.queues.deselect([queue.name for queue in QUEUES])


@worker_ready.connect
def _say_that_one_is_there(**_: Any) -> None:
    global _presence
    if _worker_id is not None:
        _presence = Presence(open_workplace(SETTINGS), _worker_id)
        _presence.start()


@worker_shutting_down.connect
def _stop_jobs(**_: Any) -> None:
    shutdown.request_stop()


@worker_shutdown.connect
def _say_that_one_leaves(**_: Any) -> None:
    if _presence is not None:
        _presence.stop()
