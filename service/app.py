"""The API: enqueues and reads, nothing else.  `python -m uvicorn service.app:create_app --factory`"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool

from job_store import json_logs
from job_store.database import upgrade
from job_store.messenger import Messenger
from job_store.reaper import Reaper
from job_store.settings import Settings
from service import errors
from service.auditing import Auditing
from service.auth import BEARER, Authentication, require_safe_address
from service.context import RequestContext
from service.deps import Stores, make_stores
from service.limits import BodyLimit
from service.openapi import ERRORS
from service.permissions import Permissions
from service.routes import (
    audit,
    files,
    health,
    inference,
    jobs,
    metrics,
    models,
    plans,
    quotas,
    uploads,
    webhooks,
    workers,
)
from service.traffic import TrafficLimit

ROUTERS = (
    uploads.router,
    files.router,
    models.router,
    plans.router,
    jobs.router,
    workers.router,
    inference.router,
    quotas.router,
    webhooks.router,
    audit.router,
)
OPEN_ROUTERS = (health.router, metrics.router)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application; settings come from the environment unless given.

    Raises:
        InvalidRequest: `auth_required`: strangers could reach it without a key.
    """
    settings = settings or Settings()
    require_safe_address(settings)
    if settings.log_format == "json":
        json_logs.configure(settings.log_level)
    stores = make_stores(settings)
    app = FastAPI(
        title="Modepress",
        version=version("modepress"),
        description="Shrinks language models and serves them. Every error is OpenAI's four-key `error` object.",
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    app.state.stores = stores
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(BEARER)], responses=ERRORS)
    for router in OPEN_ROUTERS:
        app.include_router(router)
    errors.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(TrafficLimit, settings=settings)
    app.add_middleware(Authentication, keys=stores.keys, permissions=Permissions(ROUTERS), settings=settings)
    app.add_middleware(Auditing, audit=stores.audit)
    app.add_middleware(RequestContext, metrics=stores.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    stores: Stores = app.state.stores
    await run_in_threadpool(_prepare, stores)
    reaper = Reaper(stores.engine, stores.settings)
    messenger = Messenger(stores.engine, stores.settings)
    reaper.start()
    messenger.start()
    try:
        yield
    finally:
        await run_in_threadpool(reaper.stop)
        await run_in_threadpool(messenger.stop)
        await stores.inference.aclose()
        stores.engine.dispose()


def _prepare(stores: Stores) -> None:
    stores.layout.prepare()
    upgrade(stores.engine)
    stores.uploads.sweep()
    stores.files.sweep(older_than=stores.settings.upload_ttl_seconds)
