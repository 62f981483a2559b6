"""A child process under watch: its events, its signals, its death, and its death when we die."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

EVENTS_FD = "MODEPRESS_EVENTS_FD"
SUPERVISOR_PID = "MODEPRESS_SUPERVISOR_PID"
SECRETS = ("MODEPRESS_DATABASE_URL", "MODEPRESS_BROKER_URL")  # a job process reads strangers' files: it needs neither
CHUNK = 65536
LONGEST_LINE = 1024**2


class ChildProcess:
    """A process in a session of its own that writes lines to a pipe and dies with us.

    Its standard input is a pipe that we hold and never write to: end-of-file tells it that we are gone.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
        ours = {EVENTS_FD: str(write_end), SUPERVISOR_PID: str(os.getpid())}
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**inherited, **environment, **ours},
                    pass_fds=(write_end,),
                    start_new_session=True,
                )
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._events = read_end
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(read_end, selectors.EVENT_READ)
        self.pid = self._process.pid
        self.peak_rss_bytes = 0

    def lines(self, wait_seconds: float) -> list[bytes]:
        """Return the whole lines that arrive within the given time; returns early when there are some.

        Raises:
            ValueError: a line is longer than a MiB, which no event is.
        """
        if not self._selector.get_map():
            time.sleep(min(wait_seconds, 0.05))  # the pipe is closed: only the exit is left to wait for
            return []
        if not self._selector.select(wait_seconds):
            return []
        data = os.read(self._events, CHUNK)
        if not data:
            self._selector.unregister(self._events)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            raise ValueError(f"the job process wrote an event longer than {LONGEST_LINE} bytes")
        return whole

    def drain(self) -> list[bytes]:
        """Return the lines still in the pipe, without waiting for a grandchild that keeps it open."""
        lines: list[bytes] = []
        while self._selector.get_map() and self._selector.select(0):
            lines += self.lines(0)
        return lines

    def finished(self) -> bool:
        """Whether the process has ended. It stays a zombie until `close`, so that its group's number stays ours."""
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and everything it started."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # all are gone; macOS says it the second way for a zombie
            return

    def sample_memory(self) -> int:
        """Return the largest resident size seen so far, in bytes."""
        try:
            resident = psutil.Process(self.pid).memory_info().rss
        except psutil.Error:  # it has just ended
            return self.peak_rss_bytes
        self.peak_rss_bytes = max(self.peak_rss_bytes, resident)
        return self.peak_rss_bytes

    def close(self) -> int:
        """Kill what is left of the group, reap the process and return its exit status (negative: the signal)."""
        self.signal_group(signal.SIGKILL)
        returncode = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._selector.close()
        os.close(self._events)
        return returncode
