"""What a compression is doing now, and what its time went to: nested spans, told to whoever records.

Code says `with span("solve", module="mlp"):`; without a recorder that costs a look at a variable. Spans nest, for one
thread does the work. A span's own time (without what lies inside it) is credited to its kind, but everything inside
`evaluate` and `verify` to these. Nothing here synchronises with a device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args

from api_schemas.heartbeats import Work

WHOLE: tuple[Work, ...] = ("evaluate", "verify")  # what lies inside them is theirs


@dataclass(frozen=True)
class Slice:
    """A span that has ended. Times are seconds of the recorder's clock since it began."""

    name: str
    work: Work
    start: float
    seconds: float
    depth: int
    facts: dict[str, Any]


@dataclass
class _Open:
    name: str
    credited: Work
    start: float
    facts: dict[str, Any]
    inside: float = 0.0


class Recorder:
    """Counts and times the spans of one attempt.

    Attributes:
        seconds: own time by kind of work, of spans that have ended.
        number: spans begun or ended: it grows only when the work moves.
        tokens: run through a block so far.
        flops: of the linears that ran, as `operations.counted` adds them.
    """

    def __init__(
        self,
        ended: Callable[[Slice], None],
        moved: Callable[["Recorder"], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Record from now on.

        Args:
            ended: hears of each span that has ended, inner ones first.
            moved: hears of each begin and end.
            clock: in seconds.
        """
        self._ended, self._moved, self._clock = ended, moved, clock
        self._zero = clock()
        self._open: list[_Open] = []
        self.seconds: dict[Work, float] = dict.fromkeys(get_args(Work), 0.0)
        self.number, self.tokens, self.flops = 0, 0, 0.0

    @property
    def work(self) -> Work:
        """What it is doing now."""
        return self._open[-1].credited if self._open else "other"

    def place(self, fact: str) -> Any:
        """The innermost open span's word on `stage`, `block` or `module`."""
        return next((one.facts[fact] for one in reversed(self._open) if fact in one.facts), None)

    @contextmanager
    def span(self, work: Work, name: str | None = None, **facts: Any) -> Iterator[None]:
        """Time what is done inside."""
        outer = self._open[-1] if self._open else None
        credited = outer.credited if outer is not None and outer.credited in WHOLE else work
        here = _Open(name or work, credited, self._clock() - self._zero, facts)
        self._open.append(here)
        self._step()
        try:
            yield
        finally:
            seconds = self._clock() - self._zero - here.start
            self._open.pop()
            self.seconds[credited] += seconds - here.inside
            if outer is not None:
                outer.inside += seconds
            self._ended(Slice(here.name, credited, here.start, seconds, len(self._open), facts))
            self._step()

    def _step(self) -> None:
        self.number += 1
        self._moved(self)


_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Let the spans of this thread be told to `recorder`."""
    token = _current.set(recorder)
    try:
        yield recorder
    finally:
        _current.reset(token)


@contextmanager
def span(work: Work, name: str | None = None, **facts: Any) -> Iterator[None]:
    """Time what is done inside, where somebody records.

    Args:
        work: what the time goes to.
        name: of the slice; default: the work.
        facts: `stage`, `block` and `module` say where; others are kept with the slice.
    """
    recorder = _current.get()
    if recorder is None:
        yield
        return
    with recorder.span(work, name, **facts):
        yield


def passed(tokens: int) -> None:
    """Say that tokens ran through a block."""
    recorder = _current.get()
    if recorder is not None:
        recorder.tokens += tokens
