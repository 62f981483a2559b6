"""push, models, model, delete."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from api_schemas.models import Model, ModelRequest
from modepress import model_folder, output
from modepress.client import Client
from modepress.commands.options import ApiKey, AsJson, Url, connect
from modepress.exit_codes import ExitCode

POLL_SECONDS = 1.0


def push(
    folder: Annotated[
        Path | None, typer.Argument(help="Model folder with safetensors, config and tokenizer.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Id of the model; default: the folder's name.")] = None,
    hub: Annotated[str | None, typer.Option(help="Instead of a folder: a hub id the worker downloads.")] = None,
    revision: Annotated[str | None, typer.Option(help="For --hub: branch, tag or commit.")] = None,
    server_path: Annotated[str | None, typer.Option(help="Instead of a folder: a path on the server.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Upload a model (what the server has is skipped, a broken upload goes on) and register it."""
    if sum(given is not None for given in (folder, hub, server_path)) != 1:
        raise typer.BadParameter("give exactly one of FOLDER, --hub and --server-path")
    with connect(url, api_key) as client:
        if folder is not None:
            model = _push_folder(client, folder.expanduser().resolve(), name, quiet=as_json)
        else:
            wanted = name or (hub or server_path or "").rstrip("/").rsplit("/", 1)[-1]
            request = ModelRequest(name=wanted, hub_id=hub, revision=revision, path=server_path)
            model = until_ready(client, client.register(request))
    output.show(model, as_json=as_json, human=lambda: describe_model(model))
    if model.status == "failed":
        raise typer.Exit(ExitCode.REFUSED)


def _push_folder(client: Client, folder: Path, name: str | None, *, quiet: bool) -> Model:
    found = model_folder.look_into(folder)
    for skipped, reason in found.skipped.items():
        output.err.print(f"not sent: {skipped} ({reason})")
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=output.err, disable=quiet) as progress:
        task = progress.add_task(f"push {folder.name}", total=found.bytes)
        return client.push(folder, name=name, on_progress=lambda _, sent: progress.advance(task, sent))


def until_ready(client: Client, model: Model) -> Model:
    """Ask until a worker has brought the model, or failed to."""
    while model.status == "downloading":
        time.sleep(POLL_SECONDS)
        model = client.model(model.id)
    return model


def models(as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """List the models, originals and compressed ones."""
    with connect(url, api_key) as client:
        found = client.models()
    rows = [
        (model.id, model.status, model.facts.family or model.facts.model_type if model.facts else "",
         output.count(model.facts.parameters) if model.facts else "",
         output.size(model.facts.bytes) if model.facts else "", model.parent or "")
        for model in found
    ]  # fmt: skip
    columns = ("id", "status", "family", ">parameters", ">bytes", "made from")
    output.show(found, as_json=as_json, human=lambda: output.table(columns, rows) if rows else "no models yet")


def model(
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Show one model."""
    with connect(url, api_key) as client:
        found = client.model(model_id)
    output.show(found, as_json=as_json, human=lambda: describe_model(found))


def delete(
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Delete a model and its files from the server."""
    with connect(url, api_key) as client:
        gone = client.delete(model_id)
    output.show(gone, as_json=as_json, human=lambda: f"deleted {gone.id}")


def describe_model(model: Model) -> str:
    """Say in lines what a model is and what is wrong with it."""
    lines = [
        f"{model.id}: {model.status}, from {model.origin}" + (f", made from {model.parent}" if model.parent else "")
    ]
    if model.error:
        lines.append(f"{model.error.code}: {model.error.message}")
    if facts := model.facts:
        lines.append(
            f"{facts.architecture}, {output.count(facts.parameters)} parameters in {facts.blocks} blocks, "
            f"{output.size(facts.bytes)} {facts.dtype}, context {facts.context_length or 'unknown'}"
            + (", tied head" if facts.tied_head else "")
        )
        lines += output.parts(facts.parts)
        lines += [f"cannot be compressed: {blocker.code}: {blocker.message}" for blocker in facts.blockers]
        lines += [f"warning: {warning}" for warning in facts.warnings]
    return "\n".join(lines)
