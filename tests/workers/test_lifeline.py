"""A child dies with its supervisor: by the kernel's signal, and by the end of its standard input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.servers import wait_until

BOUND = """
import time
from workers.lifeline import die_with_supervisor
die_with_supervisor()
print("bound", flush=True)
time.sleep(600)
"""
SUPERVISOR = """
import sys, time
from pathlib import Path
from workers.child import ChildProcess
child = ChildProcess([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), {})
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_child_dies_with_its_supervisor(tmp_path: Path) -> None:
    log = tmp_path / "log"
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, BOUND, str(log)], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    child = psutil.Process(int(supervisor.stdout.readline()))
    wait_until(lambda: b"bound" in log.read_bytes(), what="the bond")
    supervisor.kill()
    supervisor.communicate()
    wait_until(lambda: not child.is_running(), seconds=10, what="death of the child")


def test_the_end_of_standard_input_is_enough() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BOUND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MODEPRESS_SUPERVISOR_PID": str(os.getpid())},
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"bound\n"
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_child_whose_supervisor_is_gone_already_does_not_start() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BOUND],
        stdin=subprocess.PIPE,
        env={**os.environ, "MODEPRESS_SUPERVISOR_PID": "1"},
        start_new_session=True,
    )
    assert child.wait(10) == -signal.SIGKILL
    assert child.stdin is not None
    child.stdin.close()
