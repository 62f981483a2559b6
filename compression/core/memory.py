"""How much memory this process has held at most."""

import resource
import sys
from pathlib import Path


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
