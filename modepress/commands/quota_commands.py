"""quotas: shown and set on the server's own machine, against its database."""

from typing import Annotated

import typer
from rich.console import RenderableType
from sqlalchemy import Engine

from api_schemas.quotas import Quota, QuotaState
from job_store.database import make_engine, upgrade
from job_store.quotas import QuotaStore, parse_limit
from job_store.settings import Settings
from modepress import output
from modepress.address import home
from modepress.commands.operator import note
from modepress.commands.options import AsJson

quotas = typer.Typer(no_args_is_help=True, help="What owners may have; run on the server's machine (its database).")
LIMIT = "A whole number, with k, M, G or T for thousands; 'none': as the settings say."


@quotas.command("set")
def set_quota(
    owner: Annotated[str, typer.Argument(help="Whose.")],
    bytes_: Annotated[str | None, typer.Option("--bytes", help=f"Files, uploads and models. {LIMIT}")] = None,
    jobs: Annotated[str | None, typer.Option(help=f"Waiting or running at a time. {LIMIT}")] = None,
    tokens: Annotated[str | None, typer.Option(help=f"Of chats per day (UTC). {LIMIT}")] = None,
    as_json: AsJson = False,
) -> None:
    """Give an owner limits of its own; what is left out stays."""
    given = {"bytes": bytes_, "jobs": jobs, "tokens": tokens}
    changes = {name: parse_limit(words, name) for name, words in given.items() if words is not None}
    settings, engine = _database()
    state = QuotaStore(engine, settings.quota).set(owner, Quota(**changes))
    note(engine, owner, "quotas set", ", ".join(f"{name}={words}" for name, words in given.items() if words))
    output.show(state, as_json=as_json, human=lambda: _table([state]))


@quotas.command()
def show(as_json: AsJson = False) -> None:
    """Show what each owner may have and has."""
    settings, engine = _database()
    store = QuotaStore(engine, settings.quota)
    found = [store.state(owner) for owner in store.owners()]
    output.show(found, as_json=as_json, human=lambda: _table(found) if found else "no owner has anything yet")


def _table(states: list[QuotaState]) -> RenderableType:
    rows = [
        (
            state.owner,
            f"{output.size(state.used.bytes)} of {_size(state.limits.bytes)}",
            f"{state.used.jobs} of {_count(state.limits.jobs)}",
            f"{state.used.tokens} of {_count(state.limits.tokens)}",
        )
        for state in states
    ]
    return output.table(("owner", "bytes", "jobs", "tokens today"), rows)


def _size(limit: int | None) -> str:
    return "any" if limit is None else output.size(limit)


def _count(limit: int | None) -> str:
    return "any" if limit is None else str(limit)


def _database() -> tuple[Settings, Engine]:
    settings = Settings(home=home())
    engine = make_engine(settings.resolved_database_url)
    upgrade(engine)
    return settings, engine
