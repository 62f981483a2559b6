"""The routes of the inference process. `service` forwards requests here and streams the answers back unchanged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api_schemas.inference import COUNT_TOKENS, ChatRequest, CompletionRequest
from job_store.database import make_engine, upgrade
from job_store.settings import Settings
from workers.inference.answers import AnswerShape, Kind
from workers.inference.disconnects import ClientGone, while_connected
from workers.inference.engine import Engine, Prepare, Ticket
from workers.inference.errors import install_error_handlers
from workers.inference.images.reading import ImageFile, ImageReader, image_parts
from workers.inference.loaded import loaded_models
from workers.inference.metrics import Metrics
from workers.inference.models import ModelCache
from workers.inference.prompts import (
    chat_logprobs,
    chat_task,
    completion_task,
    refuse_broken_text,
    refuse_images,
    refuse_too_much,
)
from workers.inference.queueing import WaitingLine
from workers.inference.registry import Registry
from workers.inference.stops import stop_strings
from workers.inference.streaming import TicketStream, event_lines, gather
from workers.inference.tables.prompting import table_places
from workers.inference.tables.reading import refuse_tables
from workers.inference.tasks import Started

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; access logs do


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application; settings come from the environment unless given."""
    settings = settings or Settings()
    database = make_engine(settings.resolved_database_url)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(upgrade, database)
        models = ModelCache(settings.inference_memory_bytes)
        line = WaitingLine(settings.inference_max_waiting)
        engine = Engine(Registry(database, settings.resolved_home), models, line, metrics)
        app.state.engine = engine
        app.state.images = ImageReader(settings)
        metrics.models_loaded.set_function(lambda: sum(slot.loaded is not None for slot in models.slots))
        metrics.models_bytes.set_function(lambda: models.used_bytes)
        yield
        app.state.images.close()
        await engine.close()
        database.dispose()

    app = FastAPI(title="Modepress inference", lifespan=lifespan, docs_url=None, redoc_url=None)
    install_error_handlers(app)
    _add_generation(app)
    _add_observation(app, metrics)
    return app


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        _refuse_early(body)
        try:
            await _refuse_unshown(request, body)
            images = await _images(request, body)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return await _answer(request, body, "chat", lambda loaded: chat_task(loaded, body, images))

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        _refuse_early(body)
        return await _answer(request, body, "completion", lambda loaded: completion_task(loaded, body))


def _add_observation(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/healthz", response_model=None)
    async def health(request: Request) -> Response:
        """Say whether requests are taken; it answers while models load."""
        draining = request.app.state.engine.draining
        return JSONResponse({"status": "draining" if draining else "ok"}, status_code=503 if draining else 200)

    @app.get("/loaded")
    async def loaded(request: Request) -> dict[str, Any]:
        """List the models in memory."""
        return loaded_models(request.app.state.engine)

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _refuse_early(body: ChatRequest | CompletionRequest) -> None:
    """Refuse what needs no model before the line."""
    refuse_broken_text(body)
    stop_strings(body.stop)
    refuse_too_much(body)
    if isinstance(body, ChatRequest):
        chat_logprobs(body)


async def _refuse_unshown(request: Request, body: ChatRequest) -> None:
    """Refuse tables for a model that has no way to be shown one, before it is loaded."""
    places = table_places(body.messages)
    if places:
        source = await request.app.state.engine.find(body.model)
        await asyncio.to_thread(refuse_tables, source, places)


async def _images(request: Request, body: ChatRequest) -> tuple[ImageFile, ...]:
    """Read the files of the request's images, which no text model lets happen; decoding waits for the model's turn."""
    parts = image_parts(body.messages)
    if not parts:
        return ()
    source = await request.app.state.engine.find(body.model)
    await asyncio.to_thread(refuse_images, source, [place for place, _ in parts])
    reader: ImageReader = request.app.state.images
    return await while_connected(request.receive, reader.read(parts))


async def _answer(request: Request, body: ChatRequest | CompletionRequest, kind: Kind, prepare: Prepare) -> Response:
    engine: Engine = request.app.state.engine
    ticket = engine.submit(body.model, prepare, body.engine)
    shape = AnswerShape(kind, body.model, body.engine, scored=body.logprobs is not None and body.logprobs is not False)
    try:
        started = await while_connected(request.receive, _started(ticket))
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            told = {"include_usage": include_usage, "count_tokens": COUNT_TOKENS in request.headers}
            return TicketStream(ticket, event_lines(ticket, started, shape, **told))
        return JSONResponse(await while_connected(request.receive, gather(ticket, started, shape)))
    except ClientGone:
        ticket.cancel()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        ticket.cancel()
        raise


async def _started(ticket: Ticket) -> Started:
    event = await ticket.next()
    if not isinstance(event, Started):
        raise TypeError(f"a ticket began with {event!r}")
    return event
