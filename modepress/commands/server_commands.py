"""up and doctor."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from job_store.settings import Settings
from modepress import output
from modepress.address import home as default_home
from modepress.commands.options import AsJson
from modepress.doctor import examine
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


def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Say what this machine has of what the service needs; exit status 1 when something is missing."""
    found = examine((home or default_home()).expanduser().resolve())
    output.show(found, as_json=as_json, human=lambda: _doctor_table(found))
    if found["problems"]:
        raise typer.Exit(1)


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
        *(("problem", problem) for problem in found["problems"]),
    ]
    grid = output.table(("", ""), rows)
    grid.show_header = False
    return grid


def _packages(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '(not installed)'}" for name, version in packages.items())
