"""plan, compress, jobs, job, events, cancel, report."""

import time
from functools import partial
from typing import Annotated

import typer

from api_schemas.heartbeats import in_words
from api_schemas.jobs import TERMINAL, Job
from modepress import output
from modepress.commands import recipe_options as given
from modepress.commands.options import ApiKey, AsJson, Url, connect
from modepress.commands.plan_table import plan_table
from modepress.exit_codes import ExitCode, of_job
from modepress.job_progress import follow as follow_job
from modepress.job_progress import line
from modepress.report_table import report_table

LOG_LINES = 5
ModelId = Annotated[str, typer.Argument(metavar="MODEL")]
JobId = Annotated[str, typer.Argument(metavar="JOB")]


def plan(
    model_id: ModelId,
    recipe: given.RecipeFile = None,
    sparsity: given.Sparsity = None,
    target_parameters: given.TargetParameters = None,
    target_bytes: given.TargetBytes = None,
    max_perplexity_increase: given.MaxPerplexityIncrease = None,
    trials: given.Trials = None,
    layout: given.Layout = None,
    allocation: given.Allocation = None,
    export: given.Exports = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Say what a recipe would do (shapes, bytes, memory, time, what stands in the way), without doing it."""
    goal = given.goal(sparsity, target_parameters, target_bytes, max_perplexity_increase, trials)
    step = {**goal, "layout": layout, "allocation": allocation}
    with connect(url, api_key) as client:
        built = given.build_recipe(
            client, file=recipe, step=step, calibration={}, evaluation={}, top={"exports": given.exports_of(export)}
        )
        found = client.plan(model_id, built)
    output.show(found, as_json=as_json, human=lambda: plan_table(found))
    if found.blockers:
        raise typer.Exit(ExitCode.REFUSED)


def compress(
    model_id: ModelId,
    recipe: given.RecipeFile = None,
    sparsity: given.Sparsity = None,
    target_parameters: given.TargetParameters = None,
    target_bytes: given.TargetBytes = None,
    max_perplexity_increase: given.MaxPerplexityIncrease = None,
    trials: given.Trials = None,
    layout: given.Layout = None,
    allocation: given.Allocation = None,
    export: given.Exports = None,
    calibration: given.CalibrationText = None,
    evaluation: given.EvaluationText = None,
    image_field: given.ImageField = None,
    num_samples: given.Samples = None,
    num_windows: given.Windows = None,
    sequence_length: given.SequenceLength = None,
    gate: given.GateIncrease = None,
    seed: given.Seed = None,
    suffix: Annotated[str | None, typer.Option(help="Ends the name of the compressed model.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE kept with the job; repeatable.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never makes a second job.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Compress a model: submit a job, follow it, print the before/after table."""
    length = {"sequence_length": sequence_length}
    goal = given.goal(sparsity, target_parameters, target_bytes, max_perplexity_increase, trials)
    with connect(url, api_key) as client:
        built = given.build_recipe(
            client,
            file=recipe,
            step={**goal, "layout": layout, "allocation": allocation},
            calibration={"text": calibration, "image_field": image_field, "num_samples": num_samples, **length},
            evaluation={"text": evaluation, "num_windows": num_windows, **length},
            top={
                "seed": seed,
                "gate": None if gate is None else {"perplexity_increase": gate},
                "exports": given.exports_of(export),
            },
        )
        job = client.compress(
            model_id, built, suffix=suffix, metadata=_pairs(metadata), idempotency_key=idempotency_key
        )
        if not wait:
            output.show(job, as_json=as_json, human=lambda: job_lines(job))
            return
        note = f"job {job.id}; when you leave it goes on, and `modepress events {job.id} --follow` takes it up again"
        output.err.print(note, soft_wrap=True)
        ended = follow_job(client, job.id, console=output.err, quiet=as_json)
        has_report = ended.status == "succeeded" or (ended.error is not None and ended.error.code == "quality_gate")
        found = client.report(job.id) if has_report else None
    if as_json:
        output.write_json({"job": ended, "report": found})
    else:
        console = output.console()
        console.print(job_lines(ended), soft_wrap=True, markup=False)
        if found is not None:
            console.print(report_table(found))
    raise typer.Exit(of_job(ended.status, ended.error.code if ended.error else None))


def jobs(
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    metadata: Annotated[list[str] | None, typer.Option(help="Only jobs with this KEY=VALUE; repeatable.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List jobs, newest first."""
    with connect(url, api_key) as client:
        found = client.jobs(limit=limit, metadata=_pairs(metadata))
    rows = [
        (
            job.id,
            job.status,
            f"{job.progress.percent:.0f} %",
            job.model,
            job.compressed_model or "",
            _when(job.created_at),
        )
        for job in found
    ]
    columns = ("id", "status", ">done", "model", "result", "made")
    output.show(found, as_json=as_json, human=lambda: output.table(columns, rows) if rows else "no jobs yet")


def job(job_id: JobId, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Show one job."""
    with connect(url, api_key) as client:
        found = client.job(job_id)
    output.show(found, as_json=as_json, human=lambda: job_lines(found))


def status(job_id: JobId, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Say what a job is doing now: where, how fast, in how much memory, when it last moved, what its log says."""
    with connect(url, api_key) as client:
        found = client.job(job_id)
    output.show(found, as_json=as_json, human=lambda: status_lines(found, time.time()))


def watch(
    job_id: JobId,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Say what a job is doing, again and again until it has ended; the exit status is the job's."""
    with connect(url, api_key) as client:
        while True:
            found = client.job(job_id)
            output.show(found, as_json=as_json, human=partial(status_lines, found, time.time()))
            if found.status in TERMINAL:
                raise typer.Exit(of_job(found.status, found.error.code if found.error else None))
            time.sleep(every)


def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events with a higher sequence number.")] = 0,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Print a job's events; with --json one JSON object a line. With --follow the exit status is the job's."""
    with connect(url, api_key) as client:
        for event in client.events(job_id, after=after, follow=follow):
            output.show(event, as_json=as_json, human=partial(line, event))
        if follow:
            ended = client.job(job_id)
            raise typer.Exit(of_job(ended.status, ended.error.code if ended.error else None))


def cancel(job_id: JobId, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Ask a job to stop; what its finished blocks gave is kept for a later try."""
    with connect(url, api_key) as client:
        found = client.cancel(job_id)
    output.show(found, as_json=as_json, human=lambda: job_lines(found))


def report(job_id: JobId, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """Print the before/after table of a finished job; with --json the whole report, block by block."""
    with connect(url, api_key) as client:
        found = client.report(job_id)
    output.show(found, as_json=as_json, human=lambda: report_table(found))


def job_lines(job: Job) -> str:
    """A job in a few lines."""
    where = f" ({job.progress.stage}, {job.progress.percent:.0f} %)" if job.status == "running" else ""
    lines = [f"job {job.id}: {job.status}{where}, model {job.model}"]
    if job.compressed_model:
        lines.append(f"result: {job.compressed_model}  (modepress chat {job.compressed_model})")
    if job.error:
        lines.append(f"{job.error.code}: {job.error.message}")
    return "\n".join(lines)


def status_lines(job: Job, now: float) -> str:
    """A job and its latest heartbeat in a few lines."""
    lines, beat = [job_lines(job)], job.heartbeat
    if beat is None:
        return lines[0]
    lines.append(f"heartbeat {max(0.0, now - beat.at):.0f} s ago, attempt {beat.attempt}: {in_words(beat)}")
    lines.append(f"on {beat.worker}; a process that does not move for {beat.stalls_after_seconds:.0f} s is killed")
    lines += [f"  | {said}" for said in beat.last_log_lines[-LOG_LINES:]]
    return "\n".join(lines)


def _pairs(said: list[str] | None) -> dict[str, str]:
    pairs = dict[str, str]()
    for word in said or []:
        key, equals, value = word.partition("=")
        if not equals:
            raise typer.BadParameter(f"--metadata {word!r} must be KEY=VALUE")
        pairs[key] = value
    return pairs


def _when(moment: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
