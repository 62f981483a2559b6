"""One process of the stack: started on a leash, watched, started again when it dies, stopped with its group."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LEASH = Path(__file__).parent / "leash.py"
BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
STEADY_SECONDS = 60.0  # one that ran this long starts its backoff afresh


@dataclass
class Part:
    """A process of the stack.

    Attributes:
        ready: answers whether the part does its work now.
        death_signal: what it gets when `modepress up` itself is killed.
        grace_seconds: from SIGTERM to SIGKILL.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    folder: Path
    ready: Callable[[], bool]
    death_signal: signal.Signals = signal.SIGKILL
    grace_seconds: float = 10.0
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started_at: float = 0.0
    next_start: float = 0.0
    starts: int = 0
    log_start: int = 0

    def start(self) -> None:
        """Start the process. Must be called from the main thread: Linux's leash is bound to the starting thread."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        leash = (sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(int(self.death_signal)))
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [*leash, *self.command],
                env=dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.starts += 1

    @property
    def pid(self) -> int | None:
        """Process id, or None when it does not run."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def watch(self, say: Callable[[str], None]) -> bool:
        """Start the process again when it died and its pause is over. Returns whether a process was started."""
        if self.process is None or self.process.poll() is None:
            return False
        now = time.monotonic()
        if self.next_start < self.started_at:  # the death is news
            if now - self.started_at > STEADY_SECONDS:
                self.failures = 0
            pause = BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS) - 1)]
            self.failures += 1
            self.next_start = now + pause
            ending = _ending(self.process.returncode)
            say(f"{self.name} died ({ending}); starting it again in {pause:g} s; see {self.log}")
        if now < self.next_start:
            return False
        self.kill_group()  # nothing of the old one may stand in the new one's way
        self.start()
        return True

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the process; its children are its own to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait_stopped(self) -> None:
        """Wait for the grace period, then kill the whole process group."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.grace_seconds)
            self.kill_group()
            self.process.wait()

    def kill_group(self) -> None:
        """Kill what is left of the process group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self, lines: int = 8) -> str:
        """The end of what it logged since its last start."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
