"""The job process's side of heartbeats and of the time line: pulses up the pipe, slices into the trace file."""

import faulthandler
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from api_schemas.heartbeats import Pulse
from compression.core.operations import counted
from compression.core.timeline import Recorder, Slice, recording
from job_store.trace_files import WORK_THREAD, TraceFile
from workers.description import STACKS

PULSE_SECONDS = 0.5


def dump_on_request(attempt: Path) -> None:
    """Let SIGUSR1 write the stacks of all threads into the attempt's folder, also amid a call of a C library."""
    file = (attempt / STACKS).open("w")
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)  # keeps the file open


@contextmanager
def recorded(path: Path, fence: int, started: float, send: Callable[[Pulse], None]) -> Iterator[Recorder]:
    """Record everything inside: the whole as one slice, what it was doing as it goes.

    Args:
        path: of the trace file.
        fence: of the attempt.
        started: seconds since 1970 when this process began its work.
        send: hears at most every `PULSE_SECONDS`, and only when the work has moved.
    """
    before = time.time() - started
    with TraceFile(path, pid=fence, zero=started + before) as file:
        file.named(f"attempt under fence {fence}", {WORK_THREAD: "work"})
        last_sent = 0.0

        def draw(one: Slice) -> None:
            facts = one.facts
            if one.depth == 0:  # the whole: with what was too short or too much to be drawn
                facts = {"seconds": recorder.seconds, "slices_left_out": file.left_out}
            file.slice(one.name, one.work, one.start, one.seconds, depth=one.depth, tid=WORK_THREAD, args=facts)

        def tell(recorder: Recorder) -> None:
            nonlocal last_sent
            now = time.monotonic()
            if now - last_sent >= PULSE_SECONDS:
                last_sent = now
                send(_pulse(recorder))
                file.flush()

        file.slice("imports", "load", -before, before, depth=1, tid=WORK_THREAD, args={})
        recorder = Recorder(draw, tell)
        with recording(recorder), counted(recorder), recorder.span("other", "attempt"):
            yield recorder


def _pulse(recorder: Recorder) -> Pulse:
    torch = sys.modules["torch"]  # `compression` has imported it
    used = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else None
    return Pulse(
        number=recorder.number,
        stage=recorder.place("stage"),
        block=recorder.place("block"),
        module=recorder.place("module"),
        work=recorder.work,
        tokens=recorder.tokens,
        flops=recorder.flops,
        gpu_memory_bytes=used,
    )
