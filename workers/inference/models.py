"""Which models are in memory: loaded on demand, once; the least recently used is unloaded under a byte limit."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from api_schemas.errors import InvalidRequest
from workers.inference.loading import LoadedModel, LoadPlan, load, plan_load
from workers.inference.registry import ModelSource

logger = logging.getLogger(__name__)


@dataclass
class Slot:
    """A model that is in memory or on its way there.

    Attributes:
        source: which model.
        bytes: planned while it loads, measured afterwards.
        loading: the task that loads it; done when it is in memory.
        users: requests that use it or wait for it; it is not unloaded while there are any.
        last_used: seconds since the epoch.
    """

    source: ModelSource
    bytes: int
    loading: asyncio.Task[LoadedModel]
    users: int = 0
    last_used: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether it may be unloaded."""
        return self.users == 0 and self.loading.done()

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, once it is in memory."""
        done = self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None
        return self.loading.result() if done else None


class ModelCache:
    """Holds models up to a number of bytes.

    Weights count; the key-value caches of running requests come on top and are not counted.

    Args:
        limit_bytes: of all models together; a larger model is refused by name.
        clock: seconds since the epoch.
    """

    def __init__(self, limit_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.limit_bytes = limit_bytes
        self._clock = clock
        self._slots: dict[tuple[str, str], Slot] = {}
        self._changed = asyncio.Event()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What is in memory or on its way, least recently used first."""
        return tuple(sorted(self._slots.values(), key=lambda slot: slot.last_used))

    @property
    def used_bytes(self) -> int:
        """Bytes of all models in memory or on their way."""
        return sum(slot.bytes for slot in self._slots.values())

    @asynccontextmanager
    async def lease(self, source: ModelSource) -> AsyncIterator[LoadedModel]:
        """Load the model unless it is in memory, and keep it there for the body.

        Raises:
            InvalidRequest: `model_too_large`.
            ModepressError: what loading raises.
        """
        slot = await self._enter(source)
        try:
            loaded = await asyncio.shield(slot.loading)  # another request may wait for the same load
            self._refuse_too_large(source, loaded.bytes)
            yield loaded
        finally:
            slot.users -= 1
            slot.last_used = self._clock()
            self._make_room(0)
            self._notify()

    def forget(self, model_id: str) -> None:
        """Unload a model that is registered no more, unless it is in use."""
        for slot in self.slots:
            if slot.source.id == model_id and slot.idle:
                self._drop(slot)

    async def _enter(self, source: ModelSource) -> Slot:
        plan: LoadPlan | None = None
        while (slot := self._take(source, plan)) is None:
            if plan is None and source.key not in self._slots:
                plan = await asyncio.to_thread(plan_load, source)
                self._refuse_too_large(source, plan.bytes)
            else:
                await self._changed.wait()
        return slot

    def _take(self, source: ModelSource, plan: LoadPlan | None) -> Slot | None:
        """Return the model's slot with this user counted in, or None while it must wait for a plan or for room."""
        slot = self._slots.get(source.key)
        if slot is not None and slot.source != source and slot.idle:  # deleted and registered anew under the same id
            self._drop(slot)
            slot = None
        if slot is None and plan is not None and self._make_room(plan.bytes):
            slot = self._start(plan)
        if slot is None or slot.source != source:
            return None
        slot.users += 1
        slot.last_used = self._clock()
        return slot

    def _start(self, plan: LoadPlan) -> Slot:
        slot = Slot(plan.source, plan.bytes, asyncio.create_task(asyncio.to_thread(load, plan)))
        self._slots[plan.source.key] = slot
        slot.loading.add_done_callback(lambda _: self._settle(slot))
        return slot

    def _settle(self, slot: Slot) -> None:
        loaded = slot.loaded
        if loaded is None:
            self._slots.pop(slot.source.key, None)  # those who wait get the error; the next request tries again
        else:
            slot.bytes = loaded.bytes
            logger.info("loaded %s: %d bytes in %.1f s", slot.source.id, slot.bytes, loaded.seconds)
            self._make_room(0)
        self._notify()

    def _make_room(self, needed: int) -> bool:
        """Unload idle models, least recently used first, until `needed` more bytes fit; False when they never will."""
        for slot in self.slots:
            if self.used_bytes + needed <= self.limit_bytes:
                return True
            if slot.idle:
                self._drop(slot)
        return self.used_bytes + needed <= self.limit_bytes

    def _drop(self, slot: Slot) -> None:
        logger.info("unloading %s: %d bytes", slot.source.id, slot.bytes)
        self._slots.pop(slot.source.key, None)
        gc.collect()  # modules refer to each other in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _refuse_too_large(self, source: ModelSource, size: int) -> None:
        if size > self.limit_bytes:
            message = (
                f"model '{source.id}' needs {size} bytes in memory and this server holds at most {self.limit_bytes}; "
                "raise MODEPRESS_INFERENCE_MEMORY_BYTES or compress the model further"
            )
            raise InvalidRequest("model_too_large", message, "model")

    def _notify(self) -> None:
        """Wake all who wait for a change; who waits next waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
