"""workers: who works, and what each found of itself."""

from typing import Annotated

import typer
from rich.console import Group, RenderableType

from api_schemas.workers import SelfCheck, Worker
from modepress import output
from modepress.commands.options import ApiKey, AsJson, Url, connect

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def workers(
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most this many, newest first.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List workers with their self-checks: one that failed takes no work, and says why."""
    with connect(url, api_key) as client:
        found = client.workers(limit=limit)
    output.show(found, as_json=as_json, human=lambda: _shown(found) if found else "no worker was ever started")


def _shown(found: list[Worker]) -> RenderableType:
    rows = [
        (one.name, "yes" if one.alive else "no", one.standing, one.worker_class, f"{one.seconds:.1f} s")
        for one in found
    ]
    lines = [
        f"{one.name}: {check.name} {check.result}: {check.detail}"
        for one in found
        for check in one.checks
        if check.result in ("warn", "fail")
    ]
    newest = [f"  {check.name}: {_value(check)}{check.detail}" for check in found[0].checks]
    table = output.table(("worker", "alive", "standing", "class", "check took"), rows)
    return Group(table, *lines, f"checks of {found[0].name}:", *newest)


def _value(check: SelfCheck) -> str:
    if check.value is None or check.unit is None:
        return ""
    for factor, prefix in PREFIXES:
        if check.value >= factor:
            return f"{check.value / factor:.1f} {prefix}{check.unit}; "
    return f"{check.value:.3g} {check.unit}; "
