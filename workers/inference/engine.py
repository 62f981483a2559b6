"""The life of one request: find the model, wait for a turn, load, generate, and let go of everything.

Callers see tickets alone. One answer is generated at a time today; an engine that batches would change what happens
behind `submit`, not the tickets.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from api_schemas.errors import ModepressError, Unavailable
from api_schemas.inference import Engine as EngineName
from workers.inference.generation import generate
from workers.inference.loading import LoadedModel
from workers.inference.metrics import Metrics, RequestMeter
from workers.inference.models import ModelCache
from workers.inference.queueing import WaitingLine
from workers.inference.registry import ModelSource, Registry
from workers.inference.tasks import Event, GenerationTask, Piece, Started

logger = logging.getLogger(__name__)

Prepare = Callable[[LoadedModel], GenerationTask]


class Ticket:
    """One request's place in the engine: read its events until each answer has its finish reason, or cancel it."""

    def __init__(self, model_id: str, prepare: Prepare, engine: EngineName | None = None) -> None:
        self.model_id, self.engine = model_id, engine
        self.prepare = prepare
        self.runner: asyncio.Task[None] | None = None
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._stop = threading.Event()  # read by the generating thread between tokens
        self._generating = False

    async def next(self) -> Event:
        """Return the next event: `Started`, then pieces.

        Raises:
            ModepressError: the request was refused or ended; nothing follows.
        """
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        """Give up the request; safe at any time, from the event loop's thread."""
        self._stop.set()
        if self.runner is not None and not self._generating:
            self.runner.cancel()  # a running thread cannot be: it looks at the event between tokens

    def fail(self, error: BaseException) -> None:
        """End the reader's stream with an error."""
        self._events.put_nowait(error)

    def put(self, event: Event) -> None:
        """Hand an event to the reader."""
        self._events.put_nowait(event)

    @property
    def cancelled(self) -> bool:
        """Whether somebody gave the request up."""
        return self._stop.is_set()

    def begin_generating(self) -> None:
        """From here on `cancel` asks the thread to stop instead of interrupting the runner.

        Raises:
            asyncio.CancelledError: it was cancelled already.
        """
        if self._stop.is_set():
            raise asyncio.CancelledError
        self._generating = True


class Engine:
    """Runs requests on the models in memory, `max_running` of the line at a time."""

    def __init__(self, registry: Registry, models: ModelCache, line: WaitingLine, metrics: Metrics) -> None:
        self.registry = registry
        self.models = models
        self.line = line
        self.draining = False
        self._metrics = metrics
        self._tickets: set[Ticket] = set()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    def submit(self, model_id: str, prepare: Prepare, engine: EngineName | None = None) -> Ticket:
        """Start a request.

        Args:
            model_id: of a registered model.
            prepare: makes the task once the model is in memory; runs in a thread; what it raises goes to the reader.
            engine: what of the model answers; None is its own weights.
        """
        ticket = Ticket(model_id, prepare, engine)
        if self.draining:
            ticket.fail(_shutting_down())
            return ticket
        self._tickets.add(ticket)
        ticket.runner = asyncio.get_running_loop().create_task(self._run(ticket))
        return ticket

    def drain(self) -> None:
        """Refuse new requests and end those under way at their next token, each with a clear error."""
        self.draining = True
        for ticket in tuple(self._tickets):
            ticket.fail(_shutting_down())
            ticket.cancel()

    async def close(self) -> None:
        """Drain, and return when nothing runs any more."""
        self.drain()
        runners = [ticket.runner for ticket in self._tickets if ticket.runner is not None]
        await asyncio.gather(*runners, return_exceptions=True)
        self._threads.shutdown()

    async def _run(self, ticket: Ticket) -> None:
        try:
            source = await self.find(ticket.model_id)
            source = await asyncio.to_thread(source.answered_by, ticket.engine)
            last = await self._serve(ticket, source)
            if last is not None:  # only now: who reads the end of an answer finds its place and its model free
                ticket.put(last)
        except asyncio.CancelledError:
            logger.info("a request for %s was given up", ticket.model_id)
        except Exception as error:  # handed to the reader, who answers with it
            if not isinstance(error, ModepressError):
                logger.exception("a request for %s failed", ticket.model_id)
            ticket.fail(error)
        finally:
            self._tickets.discard(ticket)

    async def find(self, model_id: str) -> ModelSource:
        """Look the model up, after unloading what was deleted since it was loaded. Raises as `Registry.find` does."""
        held = frozenset(slot.source.id for slot in self.models.slots)
        for gone in await asyncio.to_thread(self.registry.absent, held):
            self.models.forget(gone)
        return await asyncio.to_thread(self.registry.find, model_id)

    async def _serve(self, ticket: Ticket, source: ModelSource) -> Piece | None:
        meter = RequestMeter(self._metrics, source.id)
        reason = "error"
        try:
            async with self.line.turn(meter.waiting):
                meter.running()
                async with self.models.lease(source) as loaded:
                    last = await self._generate(ticket, loaded, meter)
            reason = "abort" if last is None else last.finish_reason or "error"
            return last
        except asyncio.CancelledError:
            reason = "abort"
            raise
        finally:
            meter.ended(reason)

    async def _generate(self, ticket: Ticket, loaded: LoadedModel, meter: RequestMeter) -> Piece | None:
        """Hand out all pieces but the last, which is returned; None when the request was given up."""
        with _memory_named(loaded):
            task = await asyncio.to_thread(ticket.prepare, loaded)
        ticket.begin_generating()
        ticket.put(Started(len(task.prompt), task.choices))
        meter.prompt(len(task.prompt))
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            meter.token()
            if not task.ends_with(piece):
                ticket.put(piece)

        def work() -> Piece | None:
            piece = None
            for piece in generate(loaded, task, lambda: ticket.cancelled):
                loop.call_soon_threadsafe(deliver, piece)
            return None if piece is None or not task.ends_with(piece) else piece

        with _memory_named(loaded):
            return await loop.run_in_executor(self._threads, work)


@contextmanager
def _memory_named(loaded: LoadedModel) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"no memory left to answer with '{loaded.source.id}'; shorten the prompt or try again later"
        raise Unavailable("out_of_memory", message) from error


def _shutting_down() -> Unavailable:
    return Unavailable("shutting_down", "this server is shutting down; send the request again")
