"""`modepress up`: the whole service on one machine, started, supervised and stopped as one."""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from api_schemas.errors import Conflict, Unavailable
from modepress.stack_plan import StackPlan

POLL_SECONDS = 0.2
START_SECONDS = 120.0
START_TRIES = 3
PR_SET_CHILD_SUBREAPER = 36

Say = Callable[[str], None]


class Stack:
    """The processes of one data folder.

    Args:
        plan: which parts, where.
        say: hears one line for everything a user should know.
    """

    def __init__(self, plan: StackPlan, say: Say) -> None:
        self.plan = plan
        self._say = say
        self._stop = threading.Event()

    def run(self, on_ready: Callable[[dict[str, object]], None]) -> None:
        """Start everything, call `on_ready`, and supervise until Ctrl-C or SIGTERM; then stop everything.

        The caller holds `only_one` of the data folder.

        Raises:
            Unavailable: a part did not come up; its last words are in the message.
        """
        if sys.platform == "linux":  # grandchildren whose parent died become ours, so that none is left behind
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with self._signals():
            try:
                if not (self._start("broker") and self._start("api", "inference", "worker")):
                    return
                state = self._write_state()
                on_ready(state)
                while not self._stop.wait(POLL_SECONDS):
                    if any([part.watch(self._say) for part in self.plan.parts]):
                        self._write_state()
            finally:
                self._shut_down()

    def _start(self, *names: str) -> bool:
        """Start parts and wait until all are ready; False when the user stopped the stack meanwhile."""
        waiting = [part for part in self.plan.parts if part.name in names]
        for part in waiting:
            part.start()
        deadline = time.monotonic() + START_SECONDS
        while waiting := [part for part in waiting if not part.ready()]:
            if self._stop.wait(POLL_SECONDS):
                return False
            for part in waiting:
                died = part.pid is None
                if (died and part.starts >= START_TRIES) or time.monotonic() > deadline:
                    what = "died" if died else f"was not ready within {START_SECONDS:g} s"
                    message = f"{part.name} {what}; the end of {part.log}:\n{part.last_words()}"
                    raise Unavailable("stack_part_failed", message)
                part.watch(self._say)
        return True

    def _write_state(self) -> dict[str, object]:
        state: dict[str, object] = {
            "url": self.plan.url,
            "inference_url": self.plan.inference_url,
            "broker_url": self.plan.shown_broker_url,
            "home": str(self.plan.home),
            "logs": str(self.plan.home / "logs"),
            "pid": os.getpid(),
            "parts": {part.name: part.pid for part in self.plan.parts},
        }
        path = self.plan.home / "stack.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        temporary.chmod(0o600)
        temporary.replace(path)
        return state

    def _shut_down(self) -> None:
        (self.plan.home / "stack.json").unlink(missing_ok=True)
        others = [part for part in self.plan.parts if part.name != "broker"]
        for group in (others, [part for part in self.plan.parts if part.name == "broker"]):
            for part in group:
                part.ask_to_stop()
            for part in group:
                part.wait_stopped()
        _end_leftovers()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, _frame: FrameType | None) -> None:
            if not self._stop.is_set():
                self._say(f"stopping ({signal.Signals(number).name})")
            self._stop.set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the data folder's lock; the kernel lets go of it when this process ends, however it ends.

    Raises:
        Conflict: another `up` runs on this data folder.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "stack.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict("stack_running", _holder(home)) from None
        (home / "stack.json").unlink(missing_ok=True)  # of one that was killed
        yield


def _holder(home: Path) -> str:
    remedy = "stop it first (Ctrl-C there, or `kill PID`), or choose another folder with --home"
    try:
        state = json.loads((home / "stack.json").read_text())
    except FileNotFoundError:
        return f"another `modepress up` is just starting or stopping on {home}; {remedy}"
    return f"modepress already runs on {home}: {state['url']}, pid {state['pid']}; {remedy}"


def _end_leftovers() -> None:
    """Kill whatever still descends from this process, e.g. a job process whose worker had to be killed."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10.0)
