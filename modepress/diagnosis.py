"""Why a job is where it is, and what to do about it: its state, error, events, heartbeat, and the workers there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api_schemas.events import JobEvent
from api_schemas.heartbeats import in_words
from api_schemas.jobs import Job
from api_schemas.workers import Worker

SILENT_SECONDS = 60.0  # a heartbeat comes every 10 s by default
STACK_LINES = 12

# How a job can end badly by itself: what that means, and what helps. Codes of refusals (of the recipe, the checkpoint,
# the text) are not here: their messages name the field and the remedy.
REMEDIES: Mapping[str, tuple[str, str]] = {
    "quality_gate": (
        "the result lost more than the recipe's gate allows; it is kept, and so is the report",
        "look at `modepress report JOB`; lower the sparsity, use mode refined or more text, or raise the gate",
    ),
    "target_not_reached": (
        "no trial lost so little as the target asks for",
        "raise the target, allow more trials, or calibrate on more text",
    ),
    "reload_failed": (
        "a fresh process could not load what was written",
        "the message has its last line; look for versions that differ, for memory, for a full /tmp",
    ),
    "reload_mismatch": (
        "what was written computes something else than what was made",
        "run `modepress workers` for this machine's checks, submit again; if it comes again, report it with the recipe",
    ),
    "export_mismatch": (
        "a file in a foreign format did not read back as it was written",
        "submit again without that export; if it comes again, report it with the model's config.json",
    ),
    "not_finite": (
        "NaN or infinity appeared, twice alike where a block was solved again: it is the data's own",
        "look at the checkpoint for damage, take other text, or calibration.forward float32",
    ),
    "not_positive": (
        "the statistics of a block are too poor to be factorised, also when damped",
        "calibrate on more and more varied text",
    ),
    "block_not_reproducible": (
        "one block came out differently each time: the machine computes wrongly",
        "take that worker out of service, and run the job on another",
    ),
    "ranks_disagree": (
        "processes that share a calibration do not see or compute the same",
        "give all ranks the same model, text, packages, processor type and threads",
    ),
    "rank_lost": ("a process that shared the calibration ended", "look at that rank's output, then start all again"),
    "disk_full": (
        "no space was left on the data folder's disk; that is not tried again",
        "free some space (`modepress doctor` shows how much there is), then submit again",
    ),
    "out_of_memory": (
        "memory could not be had, also with a quarter of the tokens at once",
        "give the worker more memory, or submit shorter windows or fewer; `modepress plan` says what a recipe needs",
    ),
    "job_stalled": (
        "the process lived but did not move, in each attempt",
        "the stack below says where; raise MODEPRESS_STALL_SECONDS where the step is long and sound",
    ),
    "worker_lost": (
        "workers went silent, in each attempt, or one was told to stop",
        "look at the machine (power, network, its log of kernel messages), then submit again",
    ),
    "job_process_killed": (
        "the job's process was ended by a signal, in each attempt",
        "SIGKILL is mostly memory: give the worker more; SIGSEGV, SIGABRT: look at the log's last lines and versions",
    ),
    "job_process_failed": (
        "the job's process broke off without a named error: a fault of ours, or of a library",
        "the last log lines below; report them with the recipe",
    ),
    "job_process_stopped": ("somebody sent the job's process a signal to stop", "find out who, then submit again"),
    "model_not_found": ("the model was deleted after the job was submitted", "register it again, then submit again"),
    "file_not_found": ("a text was deleted after the job was submitted", "upload it again, then submit again"),
    "internal_error": ("a fault of ours", "the server's log has it; report it"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was seen, and what to do about it."""

    what: str
    remedy: str
    evidence: tuple[str, ...] = ()


def diagnose(job: Job, events: Sequence[JobEvent], workers: Sequence[Worker], now: float) -> list[Finding]:
    """Explain a job.

    Args:
        job: as it is now.
        events: all of its events.
        workers: that were started, newest first.
        now: seconds since 1970.

    Returns:
        What matters, most important first; nothing where all is well.
    """
    found = list[Finding]()
    if job.status == "failed":
        found.append(_failure(job, events))
    elif job.status == "queued":
        found += _waiting(workers)
    elif job.status in ("running", "cancelling"):
        found += _at_work(job, now)
    return found + _history(job, events)


def _failure(job: Job, events: Sequence[JobEvent]) -> Finding:
    if job.error is None:
        return Finding("the job failed and has no error: a fault of ours", "report it with its events")
    what, remedy = REMEDIES.get(
        job.error.code or "",
        ("the recipe, the model or the text was refused when it was looked at", "the message names field and remedy"),
    )
    evidence = [f"{job.error.code}: {job.error.message}"]
    if job.error.code == "job_stalled":
        evidence += _last_stack(events)
    elif job.heartbeat is not None:
        evidence += [f"| {line}" for line in job.heartbeat.last_log_lines[-STACK_LINES:]]
    return Finding(what, remedy.replace("JOB", job.id), tuple(evidence))


def _waiting(workers: Sequence[Worker]) -> list[Finding]:
    alive = [worker for worker in workers if worker.alive]
    if not alive:
        said = f"the last was {workers[0].name}" if workers else "none was ever started"
        return [Finding(f"no worker is alive; {said}", "start one: `modepress up`, or the compose file's worker")]
    able = [worker for worker in alive if worker.standing != "failed"]
    if not able:
        why = tuple(f"{c.name}: {c.detail}" for worker in alive for c in worker.checks if c.result == "fail")
        return [
            Finding("every worker failed its self-check and takes no work", "mend what is named, start it again", why)
        ]
    return [Finding(f"it waits for one of {len(able)} workers", "none: it starts when one is free")]


def _at_work(job: Job, now: float) -> list[Finding]:
    beat = job.heartbeat
    if beat is None:
        return []
    found = list[Finding]()
    age = now - beat.at
    if age > SILENT_SECONDS:
        found.append(
            Finding(
                f"its worker has written no heartbeat for {age:.0f} s",
                f"none at first: when its lease runs out the job is queued again; look at {beat.worker}",
            )
        )
    elif beat.progress_age_seconds > beat.stalls_after_seconds / 2:
        found.append(
            Finding(
                f"it has not moved for {beat.progress_age_seconds:.0f} s",
                f"none at first: at {beat.stalls_after_seconds:.0f} s it is dumped, killed and tried again",
                (in_words(beat),),
            )
        )
    if beat.keywords:
        words = ", ".join(f"{word} ({count})" for word, count in sorted(beat.keywords.items()))
        lines = tuple(f"| {line}" for line in beat.last_log_lines)
        found.append(Finding(f"its log speaks of {words}", "read the lines; the job goes on as long as it can", lines))
    return found


def _history(job: Job, events: Sequence[JobEvent]) -> list[Finding]:
    """What befell earlier attempts, and blocks."""
    found = list[Finding]()
    lost = tuple(event.message for event in events if "queued again" in event.message)
    if lost:
        remedy = "none if it ended well since; otherwise see above"
        found.append(Finding(f"{len(lost)} of {job.attempt} attempts were lost", remedy, lost))
    if job.status != "failed" and (stack := _last_stack(events)):
        found.append(Finding("an attempt stalled", "see where; the next attempt went on after the last block", stack))
    again = tuple(event.message for event in events if "was solved again" in event.message)
    if again:
        remedy = "correct: none; transient: this machine computed wrongly once, look at its checks (modepress workers)"
        found.append(Finding(f"{len(again)} blocks looked wrong and were solved again", remedy, again))
    slow = tuple(event.message for event in events if "was slow:" in event.message)
    if slow:
        found.append(
            Finding(f"{len(slow)} blocks were slow", "look for other work on that machine", slow[-STACK_LINES:])
        )
    return found


def _last_stack(events: Sequence[JobEvent]) -> tuple[str, ...]:
    stacks = [str(event.data["stack"]) for event in events if "stack" in event.data]
    return tuple(f"| {line}" for line in stacks[-1].splitlines()[-STACK_LINES:]) if stacks else ()
