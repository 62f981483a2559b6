"""import: published files of a family become a model, on the server or in a folder here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter

from api_schemas.errors import InvalidRequest, ModepressError
from api_schemas.imports import ImportRequest
from api_schemas.models import ModelRequest
from modepress import output
from modepress.commands.model_commands import describe_model, until_ready
from modepress.commands.options import ApiKey, AsJson, Url, connect
from modepress.exit_codes import ExitCode

LEDGER = "import_ledger.json"
IMPORT_PROCESS = (sys.executable, "-m", "compression.importers.families")

Role = Annotated[str | None, typer.Option(show_default=False)]


def import_model(
    family: Annotated[str, typer.Argument(help="tinygptv, minigpt4, artgpt4, tablegpt2 or mplug2.")],
    name: Annotated[str | None, typer.Option(help="Id of the model on the server.")] = None,
    to: Annotated[Path | None, typer.Option(help="Instead of a server: write this folder here (needs torch).")] = None,
    language: Annotated[str | None, typer.Option(help="Folder of the language model.")] = None,
    vision: Annotated[str | None, typer.Option(help="eva_vit_g.pth.")] = None,
    q_former: Annotated[str | None, typer.Option(help="blip2_pretrained_flant5xxl.pth.")] = None,
    delta: Annotated[str | None, typer.Option(help="The authors' own file.")] = None,
    folder: Annotated[str | None, typer.Option(help="tablegpt2: the published folder.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="mplug2: the authors' file.")] = None,
    bert_config: Annotated[str | None, typer.Option(help="mplug2: config_bert_large_text.json.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="mplug2: folder of bert-large-uncased's tokenizer.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A further field of the request, NAME=VALUE (stage=4, template=inst); repeatable."),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Import a model that its authors publish in a form of their own. Without --to, paths are the server's."""
    if (name is None) == (to is None):
        raise typer.BadParameter("give either --name, for the server, or --to, for a folder here")
    roles = {"language": language, "vision": vision, "q_former": q_former, "delta": delta, "folder": folder}
    roles |= {"checkpoint": checkpoint, "bert_config": bert_config, "tokenizer": tokenizer}
    given: dict[str, Any] = {"family": family, **{role: path for role, path in roles.items() if path is not None}}
    request: ImportRequest = TypeAdapter(ImportRequest).validate_python({**given, **_settings(setting or [])})
    if to is not None:
        _import_here(request, to)
        record = json.loads((to / LEDGER).read_text(encoding="utf-8"))
        output.show({"folder": str(to), **_summary(record)}, as_json=as_json, human=lambda: _in_words(to, record))
        return
    with connect(url, api_key) as client:
        model = until_ready(client, client.register(ModelRequest(name=str(name), originals=request)))
    output.show(model, as_json=as_json, human=lambda: describe_model(model))
    if model.status == "failed":
        raise typer.Exit(ExitCode.REFUSED)


def _settings(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE, where the value may be a number or true."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set {word!r} is not NAME=VALUE")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _import_here(request: ImportRequest, target: Path) -> None:
    """Run the importer in a process of its own: this command has no torch."""
    done = subprocess.run(
        [*IMPORT_PROCESS, str(target)], input=request.model_dump_json().encode(), capture_output=True, check=False
    )
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        code, colon, message = last.partition(": ")
        if colon and code.isidentifier() and code.islower():
            raise InvalidRequest(code, message)
        remedy = "pip install 'modepress[worker]' here, or import on the server with --name"
        raise ModepressError("import_failed", f"the importer ended with status {done.returncode} ({last}); {remedy}")


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("importer", "bytes", "savings", "warnings") if name in record}


def _in_words(folder: Path, record: dict[str, Any]) -> str:
    sizes = record["bytes"]
    lines = [f"{folder}: {output.size(sizes['written'])} of weights, from {output.size(sizes['read'])} of files"]
    lines += [
        f"left out, outputs the same: {one['what']}, {output.size(one['bytes'])}" for one in record.get("savings", [])
    ]
    lines += [f"warning: {warning}" for warning in record.get("warnings", [])]
    return "\n".join(lines)
