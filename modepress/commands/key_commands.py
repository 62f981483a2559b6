"""keys: made, listed and revoked on the server's own machine, against its database."""

import time
from enum import StrEnum
from typing import Annotated

import typer
from sqlalchemy import Engine

from api_schemas.keys import DEFAULT_OWNER, Scope
from job_store.database import make_engine, upgrade
from job_store.keys import KeyStore
from job_store.settings import Settings
from modepress import output
from modepress.address import home
from modepress.commands.operator import note
from modepress.commands.options import AsJson


class KeyScope(StrEnum):
    """The choices of --scope; `admin` covers the others."""

    ADMIN = "admin"
    SUBMIT = "submit"
    INFER = "infer"
    READ = "read"


keys = typer.Typer(no_args_is_help=True, help="API keys; run on the server's machine (uses its database).")


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for, e.g. laptop.")],
    scope: Annotated[
        list[KeyScope] | None,
        typer.Option(help="What it may do; repeat for more.", show_default="admin: everything", case_sensitive=False),
    ] = None,
    owner: Annotated[str, typer.Option(help="Whose models, jobs and files it works with.")] = DEFAULT_OWNER,
    per_minute: Annotated[int | None, typer.Option(min=0, help="Requests per minute; 0: no limit.")] = None,
    at_once: Annotated[int | None, typer.Option(min=0, help="Requests at a time; 0: no limit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. Its secret is shown this once; only a hash is stored."""
    scopes: list[Scope] = [one.value for one in scope or [KeyScope.ADMIN]]
    engine = _engine()
    made = KeyStore(engine).create(
        name, scopes=scopes, owner=owner, requests_per_minute=per_minute, concurrent_requests=at_once
    )
    note(engine, made.owner, "keys create", made.id)
    what = f"id {made.id}, owner {made.owner}, may {', '.join(made.scopes)}; shown this once"
    output.show(made, as_json=as_json, human=lambda: f"{made.secret}\n({what})")


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, revoked ones too."""
    found = KeyStore(_engine()).list()
    rows = [
        (key.id, key.name, key.owner, ", ".join(key.scopes), _when(key.created_at), _when(key.revoked_at))
        for key in found
    ]
    columns = ("id", "name", "owner", "scopes", "made", "revoked")
    output.show(found, as_json=as_json, human=lambda: output.table(columns, rows) if rows else "no keys yet")


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Refuse a key from now on."""
    engine = _engine()
    gone = KeyStore(engine).revoke(key_id)
    note(engine, gone.owner, "keys revoke", gone.id)
    output.show(gone, as_json=as_json, human=lambda: f"revoked {gone.id} ({gone.name})")


def _engine() -> Engine:
    engine = make_engine(Settings(home=home()).resolved_database_url)
    upgrade(engine)
    return engine


def _when(moment: int | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
