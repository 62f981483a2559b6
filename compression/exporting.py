"""From finished blocks to a sealed folder: weights, foreign formats, what serves them, and a test for those who do."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from api_schemas.plans import Plan
from api_schemas.recipe import Recipe
from api_schemas.reports import ExportReport
from compression.core.artifact import SERVE, Result, seal, write_model
from compression.core.block_store import write_durably
from compression.exporters.onnx.texts import Texts
from compression.exporters.write import write_exports
from compression.prepare import Prepared, versions
from compression.reload import logits_of
from compression.steps import Made
from preflight.plans import recipe_hash

SELF_TEST = "exports/self_test.json"
SENTENCE = (
    "In the morning the river was quiet, and the boats that had waited all night went out again. A model that is "
    "smaller than before should still answer: what is the capital of France, and what is 17 times 3?"
)


def write_result(
    recipe: Recipe, ready: Prepared, made: Made, folder: Path, model: str
) -> tuple[dict[str, str], tuple[ExportReport, ...]]:
    """Write everything of the artifact into `folder`; the caller proves it and renames it into place.

    Returns:
        SHA-256 of every file but the manifest, and what was exported.

    Raises:
        ModepressError: what `write_exports` refuses.
    """
    result = Result(
        source=made.source.model,
        raw_config=made.source.checkpoint.config,
        side_files=ready.checkpoint.side_files,
        blocks=made.blocks,
        shapes=made.shapes,
        layout=recipe.layout,
        quantization=recipe.quantization,
        bits=None if made.quantization is None else made.quantization.bits,
    )
    write_model(result, folder)
    exports = write_exports(recipe.exports, folder, Texts(ready.calibration.tokens, ready.evaluation.tokens))
    if exports:
        write_durably(folder / SELF_TEST, _json(_self_test(ready, made)))
    write_durably(folder / SERVE, _json(_serving(ready.plan, exports)))
    return seal(folder, _manifest(recipe, ready, made, model)), exports


def _manifest(recipe: Recipe, ready: Prepared, made: Made, model: str) -> dict[str, Any]:
    return {
        "format": 1,
        "parent": model,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe_hash(recipe, model),
        "blocks": [shape.model_dump() for shape in made.shapes],
        "removed_blocks": list(made.removed),
        "runtimes": [runtime.model_dump() for runtime in ready.plan.runtimes],
        "calibration": ready.calibration.use.model_dump(),
        "versions": versions(),
    }


def _serving(plan: Plan, exports: Sequence[ExportReport]) -> dict[str, Any]:
    """How the artifact can be served, by what was seen and by what is only believed; FOLDER is the artifact's."""
    return {
        "layout": plan.layout,
        "runtimes": [runtime.model_dump() for runtime in plan.runtimes],
        "exports": [export.model_dump() for export in exports],
    }


def _self_test(ready: Prepared, made: Made) -> dict[str, Any]:
    """Tokens of a fixed sentence and what must come after each: one prompt shows a runtime that computes another model.

    `margin` is by how much the first choice leads; where it is small, rounding may choose the second.
    """
    tokenizer = AutoTokenizer.from_pretrained(ready.model.folder, local_files_only=True, trust_remote_code=False)
    tokens = torch.tensor([tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]])
    logits: Tensor = logits_of(made.model, tokens)
    best = logits.topk(2, dim=-1)
    return {
        "text": SENTENCE,
        "tokens": tokens[0].tolist(),
        "next": best.indices[:, 0].tolist(),
        "logit": [round(value, 4) for value in best.values[:, 0].tolist()],
        "margin": [round(value, 4) for value in (best.values[:, 0] - best.values[:, 1]).tolist()],
        "computed": "float32, CPU; no special token before the text",
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
