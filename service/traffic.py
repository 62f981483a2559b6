"""How many requests a key sends: per minute, and at a time. Counted in Redis if there is one, else in this process."""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import Redis
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_schemas.errors import TooManyRequests
from job_store.settings import Settings
from service.errors import render_named
from service.permissions import Caller

log = logging.getLogger("modepress.service")
WINDOW_SECONDS = 60
FORGET_SECONDS = 3600  # a slot of a process that died is free again after this
PAUSE_SECONDS = 5.0  # a Redis that failed is not asked again for so long
REDIS_SECONDS = 1.0
PREFIX = "modepress-traffic"


@dataclass(frozen=True)
class Standing:
    """Where a key stands in its minute: allowed now, how many requests are left, when there will be more."""

    allowed: bool
    limit: int
    remaining: int
    reset_seconds: float


class MemoryTraffic:
    """Counts for this process alone."""

    def __init__(self) -> None:
        self._rates = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    def hit(self, key: str, limit: int) -> Standing:
        """Count a request."""
        return _hit(self._rates, key, limit)

    def enter(self, key: str, limit: int) -> str | None:
        """Take a slot; None when all are taken."""
        if self._running[key] >= limit:
            return None
        self._running[key] += 1
        return key

    def leave(self, key: str, _slot: str) -> None:
        """Give the slot back."""
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]


class RedisTraffic:
    """Counts for all API processes of a broker. Raises RedisError when it does not answer."""

    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS)
        storage = RedisStorage(url, self._redis.connection_pool, key_prefix=PREFIX)
        self._rates = SlidingWindowCounterRateLimiter(storage)

    def hit(self, key: str, limit: int) -> Standing:
        """Count a request."""
        return _hit(self._rates, key, limit)

    def enter(self, key: str, limit: int) -> str | None:
        """Take a slot; None when all are taken."""
        name, slot, now = f"{PREFIX}:running:{key}", uuid.uuid4().hex, time.time()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(name, 0, now - FORGET_SECONDS)
            pipe.zadd(name, {slot: now})
            pipe.zcard(name)
            pipe.expire(name, FORGET_SECONDS)
            taken = int(pipe.execute()[2])
        if taken > limit:
            self.leave(key, slot)
            return None
        return slot

    def leave(self, key: str, slot: str) -> None:
        """Give the slot back."""
        self._redis.zrem(f"{PREFIX}:running:{key}", slot)


class Traffic:
    """Counts in Redis while it answers, else in memory: a limit per process is better than none and than a refusal."""

    def __init__(self, broker_url: str | None) -> None:
        self._memory = MemoryTraffic()
        shared = broker_url is not None and broker_url.startswith(("redis://", "rediss://"))
        self._redis = RedisTraffic(broker_url) if broker_url is not None and shared else None
        self._pause_until = 0.0

    async def hit(self, key: str, limit: int) -> Standing:
        """Count a request."""
        if self._redis is not None and time.monotonic() >= self._pause_until:
            with self._pausing():
                return await run_in_threadpool(self._redis.hit, key, limit)
        return self._memory.hit(key, limit)

    async def enter(self, key: str, limit: int) -> tuple["MemoryTraffic | RedisTraffic", str] | None:
        """Take a slot; returns it with who counts it, or None when all are taken."""
        if self._redis is not None and time.monotonic() >= self._pause_until:
            with self._pausing():
                slot = await run_in_threadpool(self._redis.enter, key, limit)
                return None if slot is None else (self._redis, slot)
        slot = self._memory.enter(key, limit)
        return None if slot is None else (self._memory, slot)

    async def leave(self, key: str, place: "tuple[MemoryTraffic | RedisTraffic, str]") -> None:
        """Give a slot back to who counted it."""
        counter, slot = place
        with self._pausing():
            if isinstance(counter, RedisTraffic):
                await asyncio.shield(run_in_threadpool(counter.leave, key, slot))
            else:
                counter.leave(key, slot)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            log.warning("requests are counted per process for %g s: Redis (%s)", PAUSE_SECONDS, type(error).__name__)


class TrafficLimit:
    """Turns away what a key sends too much of, and says in every answer how much is left."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._traffic = Traffic(settings.broker_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request or answer 429."""
        caller: Caller | None = scope.get("state", {}).get("caller")
        if scope["type"] != "http" or caller is None:
            await self._app(scope, receive, send)
            return
        per_minute = self._settings.requests_per_minute if caller.per_minute is None else caller.per_minute
        at_once = self._settings.concurrent_requests if caller.at_once is None else caller.at_once
        standing = await self._traffic.hit(caller.name, per_minute) if per_minute else None
        send = send if standing is None else _labelled(send, standing)
        if standing is not None and not standing.allowed:
            await render_named(Request(scope), _too_many(caller, standing))(scope, receive, send)
            return
        place = await self._traffic.enter(caller.name, at_once) if at_once else None
        if at_once and place is None:
            await render_named(Request(scope), _too_many_at_once(caller, at_once))(scope, receive, send)
            return
        if place is None:
            await self._app(scope, receive, send)
            return

        async def leaving(message: Message) -> None:
            # Before the last bytes go out: who sends one request after another must find the place free again.
            nonlocal place
            if place is not None and message["type"] == "http.response.body" and not message.get("more_body", False):
                held, place = place, None
                await self._traffic.leave(caller.name, held)
            await send(message)

        try:
            await self._app(scope, receive, leaving)
        finally:
            if place is not None:
                await self._traffic.leave(caller.name, place)


def _hit(rates: SlidingWindowCounterRateLimiter, key: str, limit: int) -> Standing:
    item = RateLimitItemPerMinute(limit)
    allowed = rates.hit(item, key)
    window = rates.get_window_stats(item, key)
    # A window that began this very millisecond is told as over in 0 s; nobody should be asked back that soon.
    return Standing(allowed, limit, window.remaining, max(1.0, window.reset_time - time.time()))


def _labelled(send: Send, standing: Standing) -> Send:
    """Add the headers of draft-ietf-httpapi-ratelimit-headers, and the older ones that OpenAI's clients read."""
    seconds = round(standing.reset_seconds)

    async def labelled(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["ratelimit-policy"] = f'"requests";q={standing.limit};w={WINDOW_SECONDS}'
            headers["ratelimit"] = f'"requests";r={standing.remaining};t={seconds}'
            headers["x-ratelimit-limit-requests"] = str(standing.limit)
            headers["x-ratelimit-remaining-requests"] = str(standing.remaining)
            headers["x-ratelimit-reset-requests"] = f"{seconds}s"
        await send(message)

    return labelled


def _too_many(caller: Caller, standing: Standing) -> TooManyRequests:
    message = (
        f"key {caller.name!r} has sent its {standing.limit} requests of this minute; wait "
        f"{standing.reset_seconds:.0f} s, or ask the operator for a key with more "
        "(`modepress keys create NAME --per-minute …`)"
    )
    return TooManyRequests("rate_limit_exceeded", message, "Authorization", retry_after=standing.reset_seconds)


def _too_many_at_once(caller: Caller, limit: int) -> TooManyRequests:
    message = (
        f"key {caller.name!r} has {limit} requests under way, which is its limit; wait for one to end, or ask the "
        "operator for a key with more (`modepress keys create NAME --at-once …`)"
    )
    return TooManyRequests("concurrency_limit_exceeded", message, "Authorization", retry_after=1.0)
