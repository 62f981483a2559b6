"""How a job process ended, read from its exit status and its result file."""

import errno
import signal
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from api_schemas.errors import ErrorBody
from workers.description import (
    EXIT_CANCELLED,
    EXIT_DISK_FULL,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_OUT_OF_MEMORY,
    RESULT,
    JobResult,
)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
MEMORY_WORDS = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "MemoryError",
)
LOG_TAIL = 400


@dataclass(frozen=True)
class Finished:
    """The process said how it ended."""

    result: JobResult


@dataclass(frozen=True)
class Crashed:
    """The process ended without a word. Another attempt may go better."""

    reason: str
    error: ErrorBody


@dataclass(frozen=True)
class OutOfMemory:
    """The process could not have the memory it asked for, or was killed for it. It is tried once more in small."""

    reason: str
    error: ErrorBody


Outcome = Finished | Crashed | OutOfMemory


def classify(returncode: int, attempt: Path, *, oom_kills: int = 0) -> Outcome:
    """Return how a process ended.

    Args:
        returncode: its exit status, negative for a signal.
        attempt: its folder.
        oom_kills: processes that the kernel killed for memory meanwhile, as far as its counters tell.
    """
    if returncode == EXIT_OUT_OF_MEMORY:
        return _out_of_memory(_last_line(attempt / "log.txt"))
    if returncode == -signal.SIGKILL and oom_kills:
        return _out_of_memory("the kernel killed it for memory")
    if returncode < 0 and (words := _words_of_memory(attempt / "log.txt")):
        return _out_of_memory(words)
    if returncode == EXIT_CANCELLED:
        return _crashed("job_process_stopped", "The job process was told to stop by somebody else")
    if returncode == EXIT_DISK_FULL:
        return Finished(disk_full())
    if returncode in (EXIT_OK, EXIT_FAILED):
        try:
            return Finished(JobResult.model_validate_json((attempt / RESULT).read_bytes()))
        except (FileNotFoundError, ValidationError) as error:
            return _crashed("job_process_failed", f"The job process left no sound result ({type(error).__name__})")
    if returncode < 0:
        name = signal.Signals(-returncode).name
        cause = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return _crashed("job_process_killed", f"The job process was ended by {name}{cause}")
    last = _last_line(attempt / "log.txt")
    return _crashed("job_process_failed", f"The job process ended with status {returncode}: {last}")


def disk_full() -> JobResult:
    """Return the result of a job that found no space left."""
    body = ErrorBody(
        message="home: no space left on the disk of the data folder; free some space, then submit the job again",
        type="server_error",
        param=None,
        code="disk_full",
    )
    return JobResult(status="failed", report=None, error=body, peak_rss_bytes=0)


def stalled(reason: str) -> ErrorBody:
    """Return the error of a job whose process stopped moving once too often."""
    message = (
        f"{reason}; the job's events hold its stack. Where the step is a long one and sound, raise "
        "MODEPRESS_STALL_SECONDS of the worker; then submit the job again"
    )
    return ErrorBody(message=message, type="job_error", param=None, code="job_stalled")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the disk is full. Libraries in Rust say it in words alone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_ERRORS:
            return True
        if any(words in str(seen) for words in DISK_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory could not be had. Libraries say it in many ways."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if (isinstance(seen, OSError) and seen.errno == errno.ENOMEM) or _speaks_of_memory(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _speaks_of_memory(text: str) -> bool:
    return any(words in text for words in MEMORY_WORDS)


def _words_of_memory(log: Path) -> str | None:
    """The last line of a log that says so, for processes that died of it in a library."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip()[-LOG_TAIL:] for line in reversed(lines) if _speaks_of_memory(line)), None)


def _out_of_memory(seen: str) -> OutOfMemory:
    message = (
        f"the job process ran out of memory ({seen}); give the worker more memory, or submit a recipe with shorter "
        "windows or fewer of them"
    )
    body = ErrorBody(message=message, type="job_error", param=None, code="out_of_memory")
    return OutOfMemory(reason=f"The job process ran out of memory: {seen}", error=body)


def _crashed(code: str, reason: str) -> Crashed:
    message = f"{reason}; see the job's events and log, give it more memory or a smaller recipe, then submit it again"
    return Crashed(reason=reason, error=ErrorBody(message=message, type="job_error", param=None, code=code))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    written = [line.strip() for line in lines if line.strip()]
    return written[-1][-LOG_TAIL:] if written else "it wrote nothing"
