"""Sending an id whose row is committed: a broker that is away delays it, for the reaper sends it again."""

import logging

from api_schemas.errors import Unavailable
from job_store.queue import enqueue
from job_store.settings import Settings

logger = logging.getLogger(__name__)


def require_broker(settings: Settings) -> None:
    """Refuse work that no worker could ever hear of. Raises Unavailable `no_broker`."""
    if settings.broker_url is None:
        message = (
            "broker_url is not set, so no worker would hear of this; set MODEPRESS_BROKER_URL or use `modepress up`"
        )
        raise Unavailable("no_broker", message)


def send(object_id: str, kind: str, settings: Settings) -> None:
    """Send an id to the workers, now or, when the broker does not answer, by the reaper's next round."""
    try:
        enqueue(object_id, kind, broker_url=settings.broker_url)
    except Unavailable as error:
        logger.warning("%s %s will be sent again by the reaper: %s", kind, object_id, error.message)
