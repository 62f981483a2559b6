"""Whether this API can do its work: database, broker and inference process, each tried for real."""

import httpx
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from api_schemas.errors import Unavailable
from api_schemas.health import Check, Readiness
from job_store.database import reading
from job_store.queue import depth
from job_store.sending import require_broker
from service.deps import Stores

PROBE_SECONDS = 3.0


async def readiness(stores: Stores) -> Readiness:
    """Try everything this API depends on; never raises."""
    checks = {
        "database": await run_in_threadpool(_database, stores),
        "broker": await run_in_threadpool(_broker, stores),
        "inference": await _inference(stores),
    }
    ready = all(check.ok for check in checks.values())
    return Readiness(status="ready" if ready else "not_ready", checks=checks)


def _database(stores: Stores) -> Check:
    try:
        with reading(stores.engine) as session:
            session.execute(text("SELECT 1 FROM jobs LIMIT 1"))
    except SQLAlchemyError as error:
        return Check(ok=False, detail=f"{stores.engine.dialect.name} does not answer ({type(error).__name__})")
    return Check(ok=True, detail=stores.engine.dialect.name)


def _broker(stores: Stores) -> Check:
    try:
        require_broker(stores.settings)
        waiting = depth("compress", broker_url=stores.settings.broker_url)
    except Unavailable as error:
        return Check(ok=False, detail=error.message)
    return Check(ok=True, detail=f"{waiting} messages wait")


async def _inference(stores: Stores) -> Check:
    try:
        answer = await stores.inference.get("/healthz", timeout=PROBE_SECONDS)
    except httpx.TransportError as error:
        return Check(ok=False, detail=f"does not answer ({type(error).__name__})")
    return Check(ok=answer.status_code == 200, detail=f"answered {answer.status_code}")
