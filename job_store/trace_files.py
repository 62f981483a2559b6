"""A job's time line on disk: one file per attempt and writer under `jobs/<id>/trace/`, in Chrome's trace-event format.

The format's JSON array may lack its end, so a file is appended to event by event and opens in Perfetto as it lies
there, also when its writer was killed. Process numbers are attempts (fences), so that the gap of a crash is seen.

Reference: "Trace Event Format", Google; sec. "JSON Array Format": the closing `]` is optional.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SHORTEST_SECONDS = 0.001  # shorter slices are counted, not drawn: nobody sees them, and there are many
MOST_EVENTS = 100_000  # of one attempt; beyond it only slices this high up are drawn
ALWAYS_DRAWN_DEPTH = 2  # attempt, stage, block
FLUSH_EVENTS = 256
WATCH_THREAD, WORK_THREAD = 0, 1  # the supervisor's view of an attempt, and the job process's own


class TraceFile:
    """Appends events of one attempt to one file."""

    def __init__(self, path: Path, *, pid: int, zero: float) -> None:
        """Open the file for appending.

        Args:
            path: of the file; its folder exists.
            pid: process number of all its events: the attempt's fence.
            zero: seconds since 1970 from which the events' times count.
        """
        fresh = not path.exists()
        self._file = path.open("a", encoding="utf-8")
        self._pid, self._zero = pid, zero
        self.events = self.left_out = 0
        if fresh:
            self._file.write("[\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def named(self, process: str, threads: dict[int, str]) -> None:
        """Give the process and its threads names."""
        self._write({"name": "process_name", "ph": "M", "tid": 0, "args": {"name": process}})
        for number, name in threads.items():
            self._write({"name": "thread_name", "ph": "M", "tid": number, "args": {"name": name}})
        self.flush()

    def slice(
        self, name: str, category: str, start: float, seconds: float, *, depth: int, tid: int, args: dict[str, Any]
    ) -> None:
        """Draw a slice of time, `start` seconds after zero."""
        if depth > ALWAYS_DRAWN_DEPTH and (seconds < SHORTEST_SECONDS or self.events >= MOST_EVENTS):
            self.left_out += 1
            return
        times = {"ts": self._microseconds(start), "dur": round(seconds * 1e6, 1)}
        self._write({"name": name, "cat": category, "ph": "X", "tid": tid, **times, "args": args})

    def instant(self, name: str, at: float, args: dict[str, Any]) -> None:
        """Mark a moment, such as a fault."""
        self._write(
            {"name": name, "ph": "i", "s": "p", "tid": WATCH_THREAD, "ts": self._microseconds(at), "args": args}
        )
        self.flush()

    def counter(self, name: str, at: float, values: dict[str, float]) -> None:
        """Say what a quantity is at a moment."""
        self._write({"name": name, "ph": "C", "tid": WATCH_THREAD, "ts": self._microseconds(at), "args": values})

    def flush(self) -> None:
        """Hand everything to the operating system: it survives this process, not a crash of the machine."""
        self._file.flush()

    def _microseconds(self, seconds: float) -> float:
        return round((self._zero + seconds) * 1e6, 1)

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps({**event, "pid": self._pid}, ensure_ascii=False) + ",\n")
        self.events += 1
        if self.events % FLUSH_EVENTS == 0:
            self._file.flush()
