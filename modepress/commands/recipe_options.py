"""A recipe from a file, from options, or from both: an option given on the command line wins over the file."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from api_schemas.errors import place_of
from api_schemas.recipe import Recipe
from modepress.client import Client

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Recipe as JSON; the options below change it.")]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of the blocks' parameters to remove, e.g. 0.2.")]
MaxPerplexityIncrease = Annotated[
    float | None,
    typer.Option(help="Instead of a sparsity: look for the smallest model that loses no more, e.g. 0.1 for a tenth."),
]
Trials = Annotated[int | None, typer.Option(help="Compressions that this search may try; default 5.")]
Layout = Annotated[
    str | None, typer.Option(help="portable (loads in plain transformers), nemotron (vLLM, llama.cpp) or full.")
]
Exports = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        help="gguf:TYPE with TYPE f32, bf16 or q8_0; onnx:TYPE with TYPE float32, int8 or int4; or vllm (layout "
        "nemotron); repeatable.",
    ),
]
TargetParameters = Annotated[
    int | None, typer.Option(help="Instead of a sparsity: parameters of the whole model at most, e.g. 110000000.")
]
TargetBytes = Annotated[
    str | None, typer.Option(help="Instead of a sparsity: size of the weights' files at most, e.g. '8 GB' or '90 MiB'.")
]
Allocation = Annotated[str | None, typer.Option(help="uniform or block_influence.")]
TEXT = "builtin, self, hub:NAME, file:SERVER_PATH, upload:FILE_ID, or a local .txt/.jsonl, which is uploaded."
CalibrationText = Annotated[str | None, typer.Option("--calibration", help=f"Text for statistics: {TEXT}")]
EvaluationText = Annotated[str | None, typer.Option("--evaluation", help="Text to judge on, in the same words.")]
ImageField = Annotated[
    str | None, typer.Option(help="For vision-language models: the key that holds an image in JSONL rows.")
]
Samples = Annotated[int | None, typer.Option("--num-samples", help="Calibration windows.")]
Windows = Annotated[int | None, typer.Option("--num-windows", help="Evaluation windows.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per window, for both texts.")]
GateIncrease = Annotated[
    float | None, typer.Option("--gate", help="Fail when perplexity rises by more than this fraction, e.g. 0.5.")
]
TYPE_FIELDS = {"onnx": "weights"}  # where an export's settings call its number format otherwise than `dtype`
Seed = Annotated[int | None, typer.Option(help="Of everything random.")]


def build_recipe(
    client: Client,
    *,
    file: Path | None,
    step: dict[str, Any],
    calibration: dict[str, Any],
    evaluation: dict[str, Any],
    top: dict[str, Any],
) -> Recipe:
    """Put a recipe together; values that are None were not given.

    Raises:
        typer.BadParameter: the file or an option is no part of a valid recipe; the message names the field.
    """
    draft: dict[str, Any] = _read(file) if file is not None else {"steps": [{"method": "modegpt"}]}
    if _given(step):
        steps = draft.get("steps")
        if not (isinstance(steps, list) and steps and isinstance(steps[0], dict)):
            raise typer.BadParameter(f"{file} has no step that --sparsity, --layout or --allocation could change")
        if {"sparsity", "target"} & _given(step).keys():  # one goal replaces the other
            steps[0] = {name: value for name, value in steps[0].items() if name not in ("sparsity", "target")}
        steps[0].update(_given(step))
    for field, options in (("calibration", calibration), ("evaluation", evaluation)):
        said = {**_text_source(client, options.get("text")), **_given(options, without="text")}
        if said:
            draft[field] = {**_kept(draft.get(field, {}), said), **said}
    draft.update(_given(top))
    try:
        return Recipe.model_validate(draft)
    except ValidationError as error:
        raise typer.BadParameter(in_words(error, draft)) from error


def exports_of(said: list[str] | None) -> list[dict[str, str]] | None:
    """The recipe's exports from words like `gguf:q8_0` or `onnx:int8`; None when none was given."""
    if not said:
        return None
    parts = (word.partition(":") for word in said)
    return [{"format": name, **({TYPE_FIELDS.get(name, "dtype"): kind} if kind else {})} for name, _, kind in parts]


def goal(
    sparsity: float | None, parameters: int | None, size: str | None, increase: float | None, trials: int | None
) -> dict[str, Any]:
    """The step's goal: a sparsity or a target; None where neither was given.

    Raises:
        typer.BadParameter: more than one was given.
    """
    target = _given(
        {"parameters": parameters, "bytes": _number_or_text(size), "perplexity_increase": increase, "trials": trials}
    )
    if len(target.keys() - {"trials"}) + (sparsity is not None) > 1:
        raise typer.BadParameter(
            "--sparsity, --target-parameters, --target-bytes, --max-perplexity-increase: give one of them, not more"
        )
    return {"sparsity": sparsity, "target": target or None}


def _number_or_text(size: str | None) -> int | str | None:
    return int(size) if size is not None and size.isdecimal() else size


def in_words(error: ValidationError, draft: Any = None) -> str:
    """Name each field that is wrong, and why."""
    # A list whose only item is wrong is also reported as too short: that helps nobody.
    told = [at for at in error.errors() if at["type"] != "too_short"] or error.errors()
    places = [at["loc"] if draft is None else place_of(at, draft) for at in told]
    return "; ".join(
        f"{'.'.join(map(str, at)) or 'recipe'}: {one['msg']}" for at, one in zip(places, told, strict=True)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        draft = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(draft, dict):
        raise typer.BadParameter(f"the recipe {path} must be a JSON object, not {type(draft).__name__}")
    return draft


def _given(options: dict[str, Any], *, without: str = "") -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and name != without}


def _kept(earlier: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A new source drops the old source's fields."""
    dropped = {"path", "file_id", "dataset", "image_field"} if "source" in options else set()
    return {name: value for name, value in earlier.items() if name not in dropped}


def _text_source(client: Client, said: str | None) -> dict[str, Any]:
    if said is None or said in {"builtin", "self"}:
        return {} if said is None else {"source": said}
    for prefix, field in (("hub:", "dataset"), ("file:", "path"), ("upload:", "file_id")):
        if said.startswith(prefix):
            return {"source": prefix[:-1], field: said.removeprefix(prefix)}
    path = Path(said).expanduser()
    if not path.is_file():
        raise typer.BadParameter(f"{said!r} is neither a local file nor one of: {TEXT}")
    return {"source": "upload", "file_id": client.upload(path, purpose="calibration")}
