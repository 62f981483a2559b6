"""How much memory this process has held at most, and how much is left for others."""

import resource
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that a new process can have without swapping: the system's, or what a container's limit leaves."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (asked := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(asked) - int(used.read_text())))
    return available


def peak_rss_bytes() -> int:
    """Peak resident bytes of this process since it was started.

    Linux's `ru_maxrss` survives exec, so a small child would answer with its parent's size; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
