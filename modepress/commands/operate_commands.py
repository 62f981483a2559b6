"""gc, backup and restore: run on the server's own machine, against its database and data folder."""

from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import Engine

from job_store.backup import back_up
from job_store.backup import restore as restore_backup
from job_store.database import make_engine, upgrade
from job_store.garbage import Collector
from job_store.layout import Layout
from job_store.settings import Settings
from modepress import output
from modepress.address import home
from modepress.commands.operator import note
from modepress.commands.options import AsJson
from modepress.stack import only_one

SERVER = "server"  # the owner under which the operator's own work stands in the audit log


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what nobody needs: remains of jobs and crashes, expired uploads, and what is older than is kept."""
    settings, engine, layout = _place()
    upgrade(engine)
    found = Collector(engine, layout, settings).collect(dry_run=dry_run)
    total = sum(garbage.bytes for garbage in found)
    if found and not dry_run:
        note(engine, SERVER, "gc", f"{len(found)} things, {total} bytes")
    rows = [(garbage.kind, garbage.what, output.size(garbage.bytes), garbage.why) for garbage in found]
    output.show(
        found,
        as_json=as_json,
        human=lambda: output.table(("kind", "what", "size", "why"), rows) if rows else "nothing to remove",
    )


def backup(
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")], as_json: AsJson = False
) -> None:
    """Copy database and data folder into a new folder, while the service runs."""
    _, engine, layout = _place()
    upgrade(engine)
    facts = back_up(engine, layout, target.expanduser().resolve())
    note(engine, SERVER, "backup", str(target))
    output.show(facts, as_json=as_json, human=lambda: _told("wrote", facts.rows, facts.files, facts.bytes))


def restore(
    source: Annotated[Path, typer.Argument(help="Folder that `modepress backup` made.")], as_json: AsJson = False
) -> None:
    """Fill an empty database and data folder from a backup; the service must be stopped."""
    settings, engine, layout = _place()
    with only_one(settings.resolved_home):
        facts = restore_backup(engine, layout, source.expanduser().resolve())
        note(engine, SERVER, "restore", str(source))
    output.show(facts, as_json=as_json, human=lambda: _told("restored", facts.rows, facts.files, facts.bytes))


def _told(what: str, rows: int, files: int, size: int) -> str:
    return f"{what} {rows} rows and {files} files ({output.size(size)})"


def _place() -> tuple[Settings, Engine, Layout]:
    settings = Settings(home=home())
    return settings, make_engine(settings.resolved_database_url), Layout(settings.resolved_home)
