"""A child's side of the bond to its supervisor: it dies with it. Used before anything heavy is imported."""

import ctypes
import os
import signal
import sys
import threading

from workers.child import SUPERVISOR_PID

PR_SET_PDEATHSIG = 1


def die_with_supervisor() -> None:
    """Arrange for this process to be killed when its supervisor is gone, however that went.

    The kernel's death signal acts at once but follows the thread that forked us; end-of-file on standard input
    does not depend on threads. Both are used.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[SUPERVISOR_PID]):  # it died before the line above
        _die()
    threading.Thread(target=_wait_for_end, name="lifeline", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        continue
    _die()


def _die() -> None:
    os.killpg(0, signal.SIGKILL)
