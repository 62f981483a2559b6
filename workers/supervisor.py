"""One delivery of a job's id: claim it, run it in a child process, and write down how it ended. Never imports torch."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from api_schemas.errors import ErrorBody, ModepressError, Unavailable
from api_schemas.jobs import Usage
from job_store.json_logs import about
from job_store.layout import remove_tree
from job_store.leases import Claim, Ending
from job_store.leftovers import clear_job
from job_store.queue import enqueue
from job_store.trace_files import WATCH_THREAD, TraceFile
from workers import outcome
from workers.child import ChildProcess
from workers.description import ARTIFACT, JobDescription, JobResult
from workers.preparing import describe_job, make_attempt_folder
from workers.publishing import artifact_row, move_into_place, with_time
from workers.watching import Watch
from workers.workplace import Workplace

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
Written = TypeVar("Written")
JOB_PROCESS = (sys.executable, "-m", "workers.job_process")
SHUTDOWN_ERROR = ErrorBody(
    message="the worker was told to stop; submit the job again",
    type="job_error",
    param=None,
    code="worker_lost",
)


class Supervisor:
    """Runs jobs for one worker, one at a time.

    Args:
        place: the worker's side of the shared state.
        command: starts a job process; the attempt's folder is added as the last argument.
        stopping: whether the worker has been told to stop.
    """

    def __init__(
        self, place: Workplace, *, command: Sequence[str] = JOB_PROCESS, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._place = place
        self._command = command
        self._stopping = stopping

    def run(self, job_id: str) -> None:
        """Do a job to its end, unless somebody else holds it or it has ended. Safe to call twice."""
        with about(job_id=job_id):
            self._run(job_id)

    def _run(self, job_id: str) -> None:
        claim = self._place.leases.claim(job_id, self._place.owner, self._place.settings.lease_seconds)
        if claim is None:
            logger.info("job %s is not to be had: held, ended or gone", job_id)
            return
        logger.info("job %s claimed under fence %d", job_id, claim.fence)
        try:
            description = describe_job(self._place, claim)
            make_attempt_folder(self._place, claim, description)
            self._attempt(claim, description)
        except ModepressError as error:
            self._fail(claim, JobResult(status="failed", report=None, error=error.body(), peak_rss_bytes=0), Usage())
        except OSError as error:
            if not outcome.is_disk_full(error):
                raise
            self._fail(claim, outcome.disk_full(), Usage())

    def _attempt(self, claim: Claim, description: JobDescription) -> None:
        folder = self._place.layout.attempt(claim.job_id, claim.fence)
        threads = str(description.threads)
        environment = {
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "passive",  # spinning threads of two processes on the same cores starve each other
            "TOKENIZERS_PARALLELISM": "false",
        }
        child = ChildProcess([*self._command, str(folder)], folder / "log.txt", environment)
        path = self._place.layout.trace(claim.job_id) / f"watch-{claim.fence}.json"
        with TraceFile(path, pid=claim.fence, zero=time.time()) as trace:
            trace.named(f"attempt {claim.attempt} by {self._place.owner}", {WATCH_THREAD: "supervisor"})
            watch = Watch(self._place, claim, child, folder, trace, self._stopping)
            returncode = watch.until_end()
        if watch.cause == "fenced":
            logger.warning("job %s: fenced off; nothing is written", claim.job_id)
            remove_tree(folder)
        elif watch.cause == "cancelled":
            self._end(claim, Ending("cancelled", "Job cancelled", watch.usage()))
        elif watch.cause == "shutdown":
            self._give_back(claim, "The worker is shutting down", SHUTDOWN_ERROR, counted=False)
        elif watch.cause == "stalled":
            self._stalled(claim, watch)
        else:
            ended = outcome.classify(returncode, folder, oom_kills=watch.signs.oom_kills_since())
            self._conclude(claim, description, ended, watch.usage())

    def _stalled(self, claim: Claim, watch: Watch) -> None:
        where, stack = watch.signs.place_in_words(), watch.stack()
        reason = f"The job process lived but did not move for {watch.signs.limit_seconds:g} s ({where}) and was killed"
        data = {"stack": stack or "the process did not answer, not even with its stack", "where": where}
        self._insist(lambda: self._place.leases.note(claim.job_id, claim.fence, reason, level="error", data=data))
        self._give_back(claim, "The job process stalled", outcome.stalled(reason))

    def _conclude(self, claim: Claim, description: JobDescription, ended: outcome.Outcome, usage: Usage) -> None:
        match ended:
            case outcome.Crashed(reason, error):
                self._give_back(claim, reason, error)
            case outcome.OutOfMemory(reason, error):
                if not claim.memory_retries:
                    reason += "; the next attempt works in smaller pieces"
                self._give_back(claim, reason, error, out_of_memory=True)
            case outcome.Finished(result):
                peak = max(result.peak_rss_bytes, usage.peak_rss_bytes or 0) or None
                measured = usage.model_copy(update={"peak_rss_bytes": peak})
                if result.status == "succeeded" or _kept(result):
                    self._publish(claim, description, result, measured)
                else:
                    self._fail(claim, result, measured)

    def _publish(self, claim: Claim, description: JobDescription, result: JobResult, usage: Usage) -> None:
        artifact = self._artifact(claim)
        layout, name = self._place.layout, description.compressed_model
        message = "Job succeeded" if result.error is None else _failure(result.error)
        ending = Ending(
            status=result.status,
            message=f"{message}; the artifact is {name}",
            usage=usage,
            report=with_time(layout, claim, result.report),
            error=result.error,
            artifact=artifact_row(layout, description, artifact),
        )
        self._end(claim, ending, publish=lambda: move_into_place(layout, artifact, name))

    def _fail(self, claim: Claim, result: JobResult, usage: Usage) -> None:
        remove_tree(self._place.layout.attempt(claim.job_id, claim.fence))  # first: it may be what fills the disk
        message = _failure(result.error) if result.error is not None else "Job failed"
        self._end(claim, Ending("failed", message, usage, report=result.report, error=result.error))

    def _end(self, claim: Claim, ending: Ending, *, publish: Callable[[], None] | None = None) -> None:
        held = self._insist(lambda: self._place.leases.finish(claim.job_id, claim.fence, ending, publish=publish))
        if not held:
            logger.warning("job %s: fenced off at the end; nothing is written", claim.job_id)
            remove_tree(self._place.layout.attempt(claim.job_id, claim.fence))
            return
        logger.info("job %s %s", claim.job_id, ending.status)
        clear_job(self._place.engine, self._place.layout, claim.job_id)

    def _give_back(
        self, claim: Claim, reason: str, error: ErrorBody, *, counted: bool = True, out_of_memory: bool = False
    ) -> None:
        leases = self._place.leases
        status = self._insist(
            lambda: leases.release(
                claim.job_id, claim.fence, reason, error=error, counted=counted, out_of_memory=out_of_memory
            )
        )
        logger.warning("job %s: %s; it is %s now", claim.job_id, reason, status or "held by another worker")
        if status == "queued":
            try:
                enqueue(claim.job_id, "compress", broker_url=self._place.settings.broker_url)
            except Unavailable:
                logger.warning("job %s: the broker is away; the reaper will send it again", claim.job_id)
        elif status is not None:
            clear_job(self._place.engine, self._place.layout, claim.job_id)

    def _insist(self, write: Callable[[], Written]) -> Written:
        """Try again while the database is away, as long as the lease can be ours."""
        deadline = time.monotonic() + self._place.settings.lease_seconds
        while True:
            try:
                return write()
            except SQLAlchemyError as error:
                if time.monotonic() > deadline:
                    raise
                logger.warning("the end of a job waits for the database: %s", type(error).__name__)
                time.sleep(RETRY_SECONDS)

    def _artifact(self, claim: Claim) -> Path:
        return self._place.layout.attempt(claim.job_id, claim.fence) / ARTIFACT


def _kept(result: JobResult) -> bool:
    # a model that failed its gate is whole and is kept to be looked at; any other failure leaves nothing to keep
    return result.error is not None and result.error.code == "quality_gate"


def _failure(error: ErrorBody) -> str:
    return f"Job failed ({error.code}): {error.message}"
