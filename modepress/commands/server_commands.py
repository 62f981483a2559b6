"""up and doctor."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from api_schemas.errors import ModepressError
from api_schemas.jobs import TERMINAL, Job
from job_store.settings import Settings
from modepress import output
from modepress.address import home as default_home
from modepress.api_error import ModepressApiError
from modepress.commands.job_commands import status_lines
from modepress.commands.options import ApiKey, AsJson, Url, connect
from modepress.diagnosis import Finding, diagnose
from modepress.doctor import examine
from modepress.exit_codes import ExitCode, of_job
from modepress.stack import Stack, only_one
from modepress.stack_plan import plan_stack

Home = Annotated[
    Path | None, typer.Option(help="Data folder; default: MODEPRESS_HOME, else ./.modepress.", show_default=False)
]


def up(
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Loopback address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; a free one when it is taken.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start the whole service on this machine and stop it with Ctrl-C: broker, API, worker, inference.

    With --json one line is written to stdout when everything is ready; notices go to stderr.
    """
    said: dict[str, Any] = {"home": home or default_home(), "host": host, "port": port}
    settings = Settings(**{name: value for name, value in said.items() if value is not None})

    def on_ready(state: dict[str, object]) -> None:
        output.show(state, as_json=as_json, human=lambda: _ready_lines(state))

    with only_one(settings.resolved_home):
        plan = plan_stack(settings)
        for notice in plan.notices:
            _say(f"note: {notice}")
        _say(f"starting {', '.join(part.name for part in plan.parts)} on {plan.home}")
        Stack(plan, _say).run(on_ready)
    _say("stopped")


def _say(line: str) -> None:
    output.err.print(line, markup=False, soft_wrap=True)


def _ready_lines(state: dict[str, object]) -> str:
    return (
        f"ready\n  API        {state['url']}/v1   (docs: {state['url']}/docs)\n  broker     {state['broker_url']}\n"
        f"  data       {state['home']}\n  logs       {state['logs']}\n"
        "in another terminal: modepress push FOLDER, then modepress compress MODEL --sparsity 0.2; stop with Ctrl-C"
    )


def doctor(
    job_id: Annotated[str | None, typer.Argument(metavar="[JOB]", show_default=False)] = None,
    home: Home = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Explain a job: why it waits, does not move, or failed, and what helps. Without JOB look at this machine.

    Exit status 4 when the job failed or was cancelled; 1 when something is missing on this machine, or a worker of the
    stack that runs here failed its self-check.
    """
    if job_id is not None:
        _explain(job_id, as_json, url, api_key)
        return
    found = examine((home or default_home()).expanduser().resolve())
    if found["stack"] and found["stack"]["alive"]:
        problems, found["failed_jobs"] = _said_by(found["stack"]["url"], api_key)
        found["problems"] += problems
    output.show(found, as_json=as_json, human=lambda: _doctor_table(found))
    if found["problems"]:
        raise typer.Exit(1)


def _explain(job_id: str, as_json: bool, url: str | None, api_key: str | None) -> None:
    with connect(url, api_key) as client:
        job = client.job(job_id)
        findings = diagnose(job, list(client.events(job_id)), client.workers(limit=100), time.time())
    shown = {"job": job, "findings": [asdict(finding) for finding in findings]}
    output.show(shown, as_json=as_json, human=lambda: _explanation(job, findings))
    raise typer.Exit(
        of_job(job.status, job.error.code if job.error else None) if job.status in TERMINAL else ExitCode.OK
    )


def _explanation(job: Job, findings: list[Finding]) -> str:
    lines = [status_lines(job, time.time())]
    for finding in findings:
        lines += ["", f"- {finding.what}", f"  remedy: {finding.remedy}", *(f"  {line}" for line in finding.evidence)]
    return "\n".join(lines if findings else [*lines, "", "nothing is wrong with it"])


def _said_by(url: str, api_key: str | None) -> tuple[list[str], list[str]]:
    """What is wrong with the service that runs here, and which of its latest jobs failed."""
    try:
        with connect(url, api_key) as client:
            workers, jobs = client.workers(limit=100), client.jobs(limit=20)
    except (ModepressError, ModepressApiError) as error:
        return [f"the service at {url} does not say how it is: {error}"], []
    unfit = [worker for worker in workers if worker.alive and worker.standing == "failed"]
    failed = [job for job in jobs if job.status == "failed" and job.error is not None]
    return (
        [f"worker {worker.name} failed its self-check: modepress workers" for worker in unfit],
        [f"{job.id} ({job.error.code}): modepress doctor {job.id}" for job in failed if job.error is not None],
    )


def _doctor_table(found: dict[str, Any]) -> RenderableType:
    torch, cpu, redis = found["torch"] or {}, found["cpu"], found["redis"]
    versions = found["extras"]["worker"]
    gpus = [f"{gpu['name']}, {output.size(gpu['bytes'])}, compute {gpu['capability']}" for gpu in torch.get("gpus", [])]
    stack = found["stack"]
    rows = [
        ("modepress", f"{found['modepress']}"),
        ("python", f"{found['python']['version']}  {found['python']['path']}"),
        ("platform", found["platform"]),
        ("cpu", f"{cpu['usable']} of {cpu['cores']} cores, {' '.join(cpu['features']) or 'features unknown'}"),
        ("memory", output.size(found["memory_bytes"])),
        ("torch", f"{versions['torch']}, {torch.get('threads', '?')} threads" if torch else "not installed"),
        ("gpu", "; ".join(gpus) or "none"),
        *((f"[{extra}]", _packages(packages)) for extra, packages in found["extras"].items()),
        ("redis", f"{redis['version']}  {redis['path']}" if redis else "none found"),
        ("data folder", f"{found['home']['path']}, {output.size(found['home']['free_bytes'])} free"),
        ("running", f"{stack['url']}, pid {stack['pid']}" if stack and stack["alive"] else "no"),
        *(("failed job", failed) for failed in found.get("failed_jobs", ())),
        *(("problem", problem) for problem in found["problems"]),
    ]
    grid = output.table(("", ""), rows)
    grid.show_header = False
    return grid


def _packages(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '(not installed)'}" for name, version in packages.items())
