"""Celery's send side: names, queues and nothing of the workers' code."""

from functools import lru_cache

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from api_schemas.errors import Unavailable
from job_store.broker import broker_options
from job_store.settings import Settings

QUEUE_OF = {"compress": "compress", "fetch_model": "fetch"}  # kind -> queue
EXCHANGE = Exchange("modepress", type="direct")
QUEUES = tuple(Queue(name, EXCHANGE, routing_key=name) for name in QUEUE_OF.values())


@lru_cache(maxsize=4)
def sender(broker_url: str) -> Celery:
    """Return a Celery app that only sends."""
    app = Celery("modepress-send", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_queues=QUEUES,
        task_create_missing_queues=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        broker_connection_timeout=3.0,
        **broker_options(broker_url),
    )
    return app


def enqueue(job_id: str, kind: str, *, broker_url: str | None = None) -> None:
    """Send a job's or a model's id to the workers. Sending twice is harmless: the claim turns the second away.

    Raises:
        Unavailable: the broker cannot be reached. A queued job is sent again by the reaper.
    """
    url = broker_url or _configured_broker()
    try:
        sender(url).send_task(
            f"workers.tasks.{kind}",
            args=[job_id],
            queue=QUEUE_OF[kind],
            retry=True,
            retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.2},
        )
    except OperationalError as error:
        raise _unreachable() from error


def depth(kind: str, *, broker_url: str | None = None) -> int:
    """Return how many messages wait in the queue of a kind.

    Raises:
        Unavailable: the broker cannot be reached.
    """
    app = sender(broker_url or _configured_broker())
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=3)
            waiting: int = connection.default_channel._size(QUEUE_OF[kind])
            return waiting
    except (OperationalError, *app.connection_for_write().connection_errors) as error:
        raise _unreachable() from error


def _configured_broker() -> str:
    url = Settings().broker_url
    if url is None:
        raise Unavailable("no_broker", "broker_url is not set; set MODEPRESS_BROKER_URL or start with `modepress up`")
    return url


def _unreachable() -> Unavailable:
    return Unavailable("broker_unreachable", "the message broker does not answer; start Redis, then try again")
