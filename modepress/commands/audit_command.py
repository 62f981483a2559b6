"""audit: who did what when, read from the server's own database."""

import time
from typing import Annotated

import typer

from job_store.audit import AuditLog
from job_store.database import make_engine, upgrade
from job_store.settings import Settings
from modepress import output
from modepress.address import home
from modepress.commands.options import AsJson


def audit(
    owner: Annotated[str | None, typer.Option(help="Of this owner alone.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Lines at most, the newest.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show who did what when; run on the server's machine (uses its database)."""
    engine = make_engine(Settings(home=home()).resolved_database_url)
    upgrade(engine)
    found = AuditLog(engine).list(after=None, limit=limit, owner=owner).data
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created_at)),
            entry.actor,
            entry.owner,
            entry.action,
            entry.target or "",
            str(entry.status or ""),
            entry.address or "",
        )
        for entry in found
    ]
    columns = ("when", "who", "owner", "what", "which", "status", "from")
    output.show(found, as_json=as_json, human=lambda: output.table(columns, rows) if rows else "nothing yet")
