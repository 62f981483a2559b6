"""files and pull."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from modepress import downloads, output
from modepress.commands.options import ApiKey, AsJson, Url, connect
from modepress.downloads import PulledFile

ModelId = Annotated[str, typer.Argument(metavar="MODEL")]


def files(model_id: ModelId, as_json: AsJson = False, url: Url = None, api_key: ApiKey = None) -> None:
    """List the files of a model's folder on the server: checkpoint and exports."""
    with connect(url, api_key) as client:
        found = client.files(model_id)
    rows = [
        (file.path, output.size(file.bytes), file.belongs_to, file.layout or "", (file.sha256 or "not counted")[:16])
        for file in found
    ]
    columns = ("path", ">bytes", "belongs to", "layout", "sha256")
    output.show(found, as_json=as_json, human=lambda: output.table(columns, rows))


def pull(
    model_id: ModelId,
    into: Annotated[
        Path | None, typer.Option(help="Folder to download into; default: ./MODEL.", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="checkpoint, gguf, vllm (with the checkpoint), a file or a folder; repeatable."),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Download a model: checked, resumed where an earlier pull stopped, never over a file that differs."""
    folder = into if into is not None else Path(model_id)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with connect(url, api_key) as client, Progress(*columns, console=output.err, disable=as_json) as progress:
        total = sum(file.bytes for file in downloads.chosen(client.files(model_id), only or (), model_id))
        task = progress.add_task(f"pull {model_id}", total=total)
        pulled = client.pull(
            model_id, folder, only=only or (), on_progress=lambda _, fetched: progress.advance(task, fetched)
        )
    done = {"model": model_id, "into": str(folder.expanduser().resolve()), "files": pulled}
    output.show(done, as_json=as_json, human=lambda: _pulled_lines(model_id, folder, pulled))


def _pulled_lines(model_id: str, folder: Path, pulled: list[PulledFile]) -> str:
    lines = [f"{file.outcome}: {file.path}  {output.size(file.bytes)}  sha256 {file.sha256[:16]}…" for file in pulled]
    fetched = [file for file in pulled if file.outcome != "already there"]
    total = output.size(sum(file.bytes for file in fetched))
    return "\n".join([*lines, f"{len(fetched)} of {len(pulled)} files of {model_id} fetched into {folder}: {total}"])
