"""Who may generate now: a fair line of bounded length."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from api_schemas.errors import TooManyRequests

MAX_RETRY_SECONDS = 600
SMOOTHING = 0.2  # weight of the newest duration in the average


class QueueFull(TooManyRequests):
    """As many requests wait as may wait.

    Attributes:
        retry_after: whole seconds after which a place is likely, from the durations measured so far.
    """

    def __init__(self, max_waiting: int, retry_after: int) -> None:
        message = f"{max_waiting} requests wait already, as many as may; try again in about {retry_after} s"
        super().__init__("queue_full", message)
        self.retry_after = retry_after


class WaitingLine:
    """Admits `max_running` requests at a time, in order of arrival.

    Args:
        max_waiting: requests that may wait; one more is refused.
        max_running: requests that run at once.
    """

    def __init__(self, max_waiting: int, max_running: int = 1) -> None:
        self.max_waiting = max_waiting
        self.waiting = 0
        self.running = 0
        self._max_running = max_running
        self._places = asyncio.Semaphore(max_running)
        self._average_seconds = 0.0

    @asynccontextmanager
    async def turn(self, admitted: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for a place and hold it for the body. `admitted` is called once a place, waiting or not, is sure.

        Raises:
            QueueFull: the line is full.
        """
        if self._places.locked() and self.waiting >= self.max_waiting:
            raise QueueFull(self.max_waiting, self._retry_after())
        admitted()
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
            self._measure(time.monotonic() - start)

    def _measure(self, seconds: float) -> None:
        self._average_seconds += SMOOTHING * (seconds - self._average_seconds) if self._average_seconds else seconds

    def _retry_after(self) -> int:
        seconds = self._average_seconds * (self.waiting + 1) / self._max_running
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(seconds)))
