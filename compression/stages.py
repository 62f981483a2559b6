"""The stages of a compression: where each lies on the way to 100 %, and how long it took."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from api_schemas.events import ProgressEvent, Stage
from api_schemas.heartbeats import Work
from compression.core.protocols import ProgressSink
from compression.core.timeline import span

SPANS: dict[Stage, tuple[float, float]] = {
    "preparing": (0.0, 2.0),
    "calibrating": (2.0, 12.0),
    "compressing": (12.0, 55.0),
    "quantizing": (55.0, 70.0),
    "exporting": (70.0, 73.0),
    "verifying": (73.0, 80.0),
    "evaluating": (80.0, 100.0),
}
# what a stage's own time goes to, where its spans do not say it better
WORK: dict[Stage, Work] = {"preparing": "load", "exporting": "write", "verifying": "verify", "evaluating": "evaluate"}


class Stages:
    """Turns what the pipeline does into progress events and seconds per stage."""

    def __init__(self, sink: ProgressSink) -> None:
        """Report to `sink`."""
        self._sink = sink
        self._stage: Stage = "preparing"
        self._percent = 0.0
        self._part = (0, 1)
        self.seconds: dict[str, float] = {}

    @property
    def name(self) -> Stage:
        """The stage that was entered last."""
        return self._stage

    @contextmanager
    def stage(self, stage: Stage, message: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self._stage = stage
        started = time.perf_counter()
        self._sink.emit(ProgressEvent(message=message, stage=stage, percent=self._forward(SPANS[stage][0]), data={}))
        with span(WORK.get(stage, "other"), stage, stage=stage):
            yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def block(self, message: str, index: int, of: int, **data: float | str) -> None:
        """Say that step `index` of `of` in the current stage is done."""
        low, high = SPANS[self._stage]
        part, parts = self._part
        self._sink.emit(
            ProgressEvent(
                message=message,
                stage=self._stage,
                block=index,
                blocks_total=of,
                percent=self._forward(low + (high - low) * (part + (index + 1) / of) / parts),
                data=dict(data),
            )
        )

    @contextmanager
    def part(self, number: int, of: int) -> Iterator[None]:
        """Let the blocks inside fill part `number` of `of` of their stage, for work that is done several times."""
        self._part = (number, of)
        yield
        self._part = (0, 1)

    def _forward(self, percent: float) -> float:
        """Progress never goes back."""
        self._percent = max(self._percent, percent)
        return self._percent

    def announce(self, notes: Iterable[str], warnings: Iterable[str]) -> None:
        """Say what the plan notes and what a user should know now; the report repeats the warnings."""
        percent = self._forward(SPANS[self._stage][0])
        for level, messages in (("info", notes), ("warn", warnings)):
            for message in messages:
                event = {"level": level, "message": message, "stage": self._stage, "percent": percent, "data": {}}
                self._sink.emit(ProgressEvent.model_validate(event))

    def warn(self, message: str) -> None:
        """Say what a user should know of the block just finished."""
        self.announce((), (message,))
