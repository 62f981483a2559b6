"""`modepress up` as a user starts it, on a folder of its own, ended at the end whatever happened."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.servers import wait_until

STOP_SECONDS = 60.0


@dataclass
class RunningStack:
    """A stack that is up."""

    process: subprocess.Popen[str]
    home: Path
    state: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.state["url"])

    def family(self) -> list[psutil.Process]:
        """Every process that descends from it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user who has set nothing but the data folder, and no self-check, which has its own tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODEPRESS_")}
    ours = {"MODEPRESS_HOME": str(home), "MODEPRESS_SELF_CHECK": "skip", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **(extra or {})}


@contextmanager
def running_stack(home: Path, *arguments: str, extra: Mapping[str, str] | None = None) -> Iterator[RunningStack]:
    """Start `modepress up --json` and yield it when it says that it is ready."""
    command = [sys.executable, "-m", "modepress", "up", "--json", "--port", "0", *arguments]
    home.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.stderr").open("w") as words:
        process = subprocess.Popen(
            command, env=environment(home, extra), stdout=subprocess.PIPE, stderr=words, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"up said nothing; on stderr: {Path(words.name).read_text()}"
        yield RunningStack(process, home, json.loads(line))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)
        process.stdout.close()


def all_gone(processes: list[psutil.Process]) -> None:
    """Wait until none of the processes lives (a zombie that nobody has waited for yet does not)."""

    def none_left() -> bool:
        return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes if _there(one))

    wait_until(none_left, seconds=30.0, what="end of all processes")


def _there(process: psutil.Process) -> bool:
    return psutil.pid_exists(process.pid)
