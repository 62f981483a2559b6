"""What a decoder's place inside a larger model rules out, warns of, and means for those who load the result."""

from collections.abc import Iterator

from api_schemas.plans import Blocker, RuntimeSupport
from api_schemas.recipe import Recipe
from preflight.composites import Placed
from preflight.runtimes import RELOAD, support

STAYS = "the vision tower and the projector stay as they are, byte for byte"


def part_recipe_blockers(placed: Placed | None, recipe: Recipe) -> list[Blocker]:
    """Why a recipe cannot be carried out on a decoder that stands among other parts, by name."""
    if placed is None:
        return []
    found, whole = [], placed.composite.model_type
    if recipe.layout == "nemotron":
        message = (
            f"layout 'nemotron' is NVIDIA's class for a text decoder alone, and this is a {whole}; use layout "
            "'portable' or 'full'"
        )
        found.append(Blocker(code="nemotron_family", message=message, param="recipe.steps.0.layout"))
    for index, export in enumerate(recipe.exports):
        message = (
            f"export {export.format}: a file of the decoder alone would lose the vision tower of this {whole}; leave "
            "the export out"
        )
        found.append(Blocker(code="export_of_part", message=message, param=f"recipe.exports.{index}"))
    return found


def part_warnings(placed: Placed | None) -> list[str]:
    """What a user of a model with several parts should know before the job."""
    if placed is None:
        return []
    return [
        "text_only_calibration: calibrated and judged on text only; what the decoder loses on image tokens is not "
        "measured"
    ]


def part_runtimes(placed: Placed | None, layout: str) -> tuple[RuntimeSupport, ...]:
    """Which runtimes load the result; empty where the model is a decoder alone."""
    return () if placed is None else tuple(_rows(placed, layout))


def _rows(placed: Placed, layout: str) -> Iterator[RuntimeSupport]:
    stock = f"{placed.composite.architecture}, no remote code; {STAYS}"
    if layout == "full":
        refused = "no stock class has widths per block and rotary pairs per head"
        test = "tests/compression/test_composites.py"
        yield support("transformers", "refused", refused, "import compression.runtime first", test)
        yield support("vllm", "refused", refused, None, "not run")
        return
    yield support("transformers", "verified", stock, "transformers serve FOLDER", RELOAD)
    why = f"{placed.composite.architecture} with an ordinary width in text_config"
    yield support("vllm", "believed", why, "vllm serve FOLDER", "not run here")
