"""What every route may use: the stores of this app, made once, as the caller may see them."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import httpx
from fastapi import Depends, Request
from sqlalchemy import Engine

from job_store.audit import AuditLog
from job_store.database import make_engine
from job_store.files import FileStore
from job_store.jobs import JobStore
from job_store.keys import KeyStore
from job_store.layout import Layout
from job_store.model_files import ModelFileStore
from job_store.models import ModelStore
from job_store.outbound import system_resolver
from job_store.owners import SERVER, Viewer
from job_store.quotas import QuotaStore
from job_store.settings import Settings
from job_store.uploads import UploadStore
from job_store.webhooks import WebhookStore
from service.metrics import Metrics
from service.permissions import Caller

FIRST_TOKEN_SECONDS = 900.0  # a large model may first have to be loaded


@dataclass(frozen=True)
class Stores:
    """Everything an app holds."""

    settings: Settings
    engine: Engine
    layout: Layout
    files: FileStore
    uploads: UploadStore
    models: ModelStore
    model_files: ModelFileStore
    keys: KeyStore
    quotas: QuotaStore
    audit: AuditLog
    webhooks: WebhookStore
    jobs: JobStore
    metrics: Metrics
    inference: httpx.AsyncClient

    def seen_by(self, viewer: Viewer) -> "Stores":
        """Return the same stores for somebody who sees their own rows alone (or, as admin, all)."""
        return replace(self, **_viewed(self.engine, self.layout, self.settings, viewer))


def make_stores(settings: Settings) -> Stores:
    """Build the stores. Nothing is written yet: the app's start does that."""
    engine = make_engine(settings.resolved_database_url)
    layout = Layout(settings.resolved_home)
    return Stores(
        settings=settings,
        engine=engine,
        layout=layout,
        keys=KeyStore(engine),
        quotas=QuotaStore(engine, settings.quota),
        audit=AuditLog(engine),
        metrics=Metrics(engine, settings),
        inference=httpx.AsyncClient(
            base_url=settings.inference_url,
            timeout=httpx.Timeout(FIRST_TOKEN_SECONDS, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            trust_env=False,  # the inference process is a neighbour, never behind a proxy
        ),
        **_viewed(engine, layout, settings, SERVER),
    )


def _viewed(engine: Engine, layout: Layout, settings: Settings, viewer: Viewer) -> dict[str, Any]:
    files = FileStore(engine, layout, viewer=viewer)
    models = ModelStore(engine, layout, settings, files=files, viewer=viewer)
    return {
        "files": files,
        "uploads": UploadStore(engine, layout, settings, files, viewer=viewer),
        "models": models,
        "model_files": ModelFileStore(engine, models),
        "jobs": JobStore(engine, viewer=viewer),
        "webhooks": WebhookStore(engine, settings.private_webhook_hosts, system_resolver, viewer=viewer),
    }


def caller_of(request: Request) -> Caller:
    """Return who sent this request. Only routes behind `service.auth.Authentication` have a caller."""
    caller: Caller = request.state.caller
    return caller


def server_stores_of(request: Request) -> Stores:
    """Return the stores of the app that serves this request, which see everything: for routes that show no rows."""
    stores: Stores = request.app.state.stores
    return stores


CallerOf = Annotated[Caller, Depends(caller_of)]
ServerStoresOf = Annotated[Stores, Depends(server_stores_of)]


def stores_of(stores: ServerStoresOf, caller: CallerOf) -> Stores:
    """Return the stores as the caller sees them."""
    return stores.seen_by(caller.viewer(stores.settings.quota))


StoresOf = Annotated[Stores, Depends(stores_of)]
