"""The process that does one attempt at a job: `python -m workers.job_process <attempt folder>`.

It reads `../job.json`, writes events as JSON lines to an inherited pipe, leaves `artifact/` and `result.json` in the
attempt's folder, and opens no database.
"""

import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from api_schemas.errors import ModepressError
from api_schemas.events import ProgressEvent
from api_schemas.heartbeats import Pulse
from job_store.layout import sync_tree, write_whole
from job_store.leftovers import DESCRIPTION
from workers import description as words
from workers.child import EVENTS_FD
from workers.description import JobDescription, JobResult
from workers.lifeline import die_with_supervisor
from workers.outcome import is_disk_full, is_out_of_memory


class PipeSink:
    """Sends events up the pipe; raises `Cancelled` at the next event after a SIGTERM."""

    def __init__(self, descriptor: int, cancelled: type[BaseException]) -> None:
        self._descriptor = descriptor
        self._cancelled = cancelled
        self._told_to_stop = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._told_to_stop = True

    def emit(self, event: ProgressEvent) -> None:
        """Send an event.

        Raises:
            Cancelled: the supervisor asked this process to stop.
        """
        if self._told_to_stop:
            raise self._cancelled("told to stop by the supervisor")
        self._send(event.model_dump_json().encode() + b"\n")

    def pulse(self, pulse: Pulse) -> None:
        """Send where the work is; only `emit` stops it, between blocks."""
        self._send(b'{"pulse":' + pulse.model_dump_json().encode() + b"}\n")

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]


def main(attempt: Path) -> int:
    """Do the attempt and return the exit status (see `workers.description`)."""
    die_with_supervisor()
    job = JobDescription.model_validate_json((attempt.parent / DESCRIPTION).read_bytes())
    try:
        result = _compress(job, attempt)
        if result is None:
            return words.EXIT_CANCELLED
        write_whole(attempt / words.RESULT, result.model_dump_json().encode())
    except Exception as error:
        if is_disk_full(error):
            return words.EXIT_DISK_FULL
        if is_out_of_memory(error):
            traceback.print_exc()
            return words.EXIT_OUT_OF_MEMORY
        raise
    return words.EXIT_OK if result.status == "succeeded" else words.EXIT_FAILED


def _compress(job: JobDescription, attempt: Path) -> JobResult | None:
    started = time.time()
    import torch  # after the environment has said how many threads there are, and in no other process of ours

    from compression.core.blockwise import chunks_of
    from compression.core.placement import choose_device
    from compression.core.protocols import Cancelled
    from compression.judgement import GateFailed
    from compression.pipeline import compress
    from workers.recording import dump_on_request, recorded

    torch.set_num_threads(job.threads)
    dump_on_request(attempt)
    artifact, sink = attempt / words.ARTIFACT, PipeSink(int(os.environ[EVENTS_FD]), Cancelled)
    trace = attempt.parent / "trace" / f"job-{job.fence}.json"
    try:
        with recorded(trace, job.fence, started, sink.pulse), chunks_of(job.chunk_tokens):
            report = compress(
                job.recipe,
                Path(job.source),
                artifact,
                model=job.model,
                blocks=attempt.parent / "blocks",
                progress=sink,
                files={file_id: Path(path) for file_id, path in job.files.items()},
                roots=[Path(root) for root in job.roots],
                hub_offline=job.hub_offline,
                device=choose_device(job.device),
            )
    except Cancelled:
        return None
    except ModepressError as error:
        if is_out_of_memory(error):  # of a fresh process that could not load the artifact
            raise
        kept = error.report.model_dump(mode="json") if isinstance(error, GateFailed) else None
        if artifact.exists():
            sync_tree(artifact)
        return JobResult(status="failed", report=kept, error=error.body(), peak_rss_bytes=_peak())
    sync_tree(artifact)
    return JobResult(status="succeeded", report=report.model_dump(mode="json"), error=None, peak_rss_bytes=_peak())


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
