"""What every route may use: the stores of this app, made once."""

from dataclasses import dataclass
from typing import Annotated

import httpx
from fastapi import Depends, Request
from sqlalchemy import Engine

from job_store.database import make_engine
from job_store.files import FileStore
from job_store.jobs import JobStore
from job_store.keys import KeyStore
from job_store.layout import Layout
from job_store.model_files import ModelFileStore
from job_store.models import ModelStore
from job_store.settings import Settings
from job_store.uploads import UploadStore
from service.metrics import Metrics

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
    jobs: JobStore
    metrics: Metrics
    inference: httpx.AsyncClient


def make_stores(settings: Settings) -> Stores:
    """Build the stores. Nothing is written yet: the app's start does that."""
    engine = make_engine(settings.resolved_database_url)
    layout = Layout(settings.resolved_home)
    files = FileStore(engine, layout)
    models = ModelStore(engine, layout, settings, files=files)
    return Stores(
        settings=settings,
        engine=engine,
        layout=layout,
        files=files,
        uploads=UploadStore(engine, layout, settings, files),
        models=models,
        model_files=ModelFileStore(engine, models),
        keys=KeyStore(engine),
        jobs=JobStore(engine),
        metrics=Metrics(engine),
        inference=httpx.AsyncClient(
            base_url=settings.inference_url,
            timeout=httpx.Timeout(FIRST_TOKEN_SECONDS, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            trust_env=False,  # the inference process is a neighbour, never behind a proxy
        ),
    )


def stores_of(request: Request) -> Stores:
    """Return the stores of the app that serves this request."""
    stores: Stores = request.app.state.stores
    return stores


StoresOf = Annotated[Stores, Depends(stores_of)]
