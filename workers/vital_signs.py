"""What a supervisor sees of its job process: whether it moves, how fast, what it holds, what its log says."""

import os
import re
import shutil
import socket
import time
from collections import Counter, deque
from pathlib import Path

import psutil

from api_schemas.heartbeats import Heartbeat, Pulse
from job_store.json_logs import CREDENTIALS
from job_store.leases import Claim
from workers.workplace import Workplace

KEYWORDS = {
    "CUDA out of memory": r"CUDA out of memory",
    "CUDA error": r"CUDA error",
    "Xid": r"\bXid\b",
    "NCCL": r"\bNCCL\b",
    "nan": r"(?i:\bnan\b)",
    "Killed": r"\bKilled\b",
    "No space left": r"No space left",
    "Segmentation fault": r"Segmentation fault",
}
LINES, LINE_LENGTH = 20, 300
READ_BYTES = 256 * 1024  # of the log at one look; what a faster log says in between is counted at later looks
PATIENCE = 10  # a process that was silent for s seconds and went on may be silent for so many times s
OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


class LogWatch:
    """Follows a growing log: its last lines, and how often it spoke of trouble."""

    def __init__(self, path: Path) -> None:
        """Start at the log's beginning; it may not be there yet."""
        self._path, self._offset, self._rest = path, 0, ""
        self.lines: deque[str] = deque(maxlen=LINES)
        self.keywords: Counter[str] = Counter()

    def look(self) -> None:
        """Read what was added."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(READ_BYTES)
        self._offset += len(data)
        *whole, self._rest = re.split(r"[\r\n]", self._rest + data.decode(errors="replace"))
        self._rest = self._rest[-LINE_LENGTH:]
        for line in whole:
            shown = "".join(c for c in CREDENTIALS.sub("***@", line) if c.isprintable()).strip()
            if shown:
                self.lines.append(shown[:LINE_LENGTH])
                self.keywords.update(word for word, pattern in KEYWORDS.items() if re.search(pattern, line))


class VitalSigns:
    """The signs of one job process, for one claim."""

    def __init__(self, place: Workplace, claim: Claim, child_pid: int, log: Path) -> None:
        """Begin to watch; times are of `time.monotonic`."""
        self._place, self._claim, self._child_pid = place, claim, child_pid
        self._log = LogWatch(log)
        self._moved = self._beaten = time.monotonic()
        self._longest_silence = 0.0
        self._pulse: Pulse | None = None
        self._before: tuple[int, float] = (0, 0.0)  # tokens and operations at the heartbeat before
        self._oom_kills = oom_kills()

    def hear(self, pulse: Pulse | None) -> None:
        """The process has moved: it sent a pulse, or an event."""
        now = time.monotonic()
        self._longest_silence = max(self._longest_silence, now - self._moved)
        self._moved = now
        if pulse is not None:
            self._pulse = pulse

    @property
    def limit_seconds(self) -> float:
        """Silence beyond this is a stall: the setting, or a multiple of a silence that ended by itself."""
        return max(self._place.settings.stall_seconds, PATIENCE * self._longest_silence)

    def silence(self) -> float:
        """Seconds since the process last moved."""
        return time.monotonic() - self._moved

    def place_in_words(self) -> str:
        """Where the process was when it last moved."""
        if self._pulse is None:
            return "before its first step"
        block = None if self._pulse.block is None else f"block {self._pulse.block + 1}"
        return " ".join(part for part in (self._pulse.stage, block, self._pulse.module, self._pulse.work) if part)

    def oom_kills_since(self) -> int:
        """Processes that the kernel has killed for memory since the watch began, here or in this container."""
        return oom_kills() - self._oom_kills

    def heartbeat(self) -> Heartbeat:
        """Look at everything now; rates are since the heartbeat before."""
        now = time.monotonic()
        elapsed, self._beaten = max(1e-3, now - self._beaten), now
        self._log.look()
        pulse = self._pulse
        tokens, flops = (pulse.tokens, pulse.flops) if pulse is not None else (0, 0.0)
        ran = tokens - self._before[0], flops - self._before[1]
        self._before = tokens, flops
        peak, rate = self._place.settings.peak_flops, ran[1] / elapsed if ran[1] else None
        rss, alive = _resident(self._child_pid)
        return Heartbeat(
            at=time.time(),
            attempt=self._claim.attempt,
            fence=self._claim.fence,
            worker=self._place.owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            child_pid=self._child_pid,
            child_alive=alive,
            stage=pulse.stage if pulse else None,
            block=pulse.block if pulse else None,
            module=pulse.module if pulse else None,
            work=pulse.work if pulse else None,
            tokens_done=tokens,
            tokens_per_second=ran[0] / elapsed if ran[0] else None,
            flops_per_second=rate,
            mfu=rate / peak if rate is not None and peak else None,
            rss_bytes=rss,
            gpu_memory_bytes=pulse.gpu_memory_bytes if pulse else None,
            disk_free_bytes=shutil.disk_usage(self._place.layout.home).free,
            progress_number=pulse.number if pulse else 0,
            progress_age_seconds=now - self._moved,
            stalls_after_seconds=self.limit_seconds,
            last_log_lines=tuple(self._log.lines),
            keywords=dict(self._log.keywords),
        )


def oom_kills() -> int:
    """Processes that the kernel has killed for memory so far, by its own counters; 0 where it has none."""
    for path in OOM_COUNTERS:
        if path.exists():
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), flags=re.MULTILINE)
            if found:
                return int(found[1])
    return 0


def _resident(pid: int) -> tuple[int | None, bool]:
    """Resident bytes of a process and of all that it started, and whether it lives."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None, False
        total = process.memory_info().rss
        for child in process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:  # it has just ended, and holds nothing
                continue
    except psutil.Error:
        return None, False
    return total, True
