"""What a decoder's place inside a larger model rules out, warns of, and means for those who load the result."""

from collections.abc import Iterator

from api_schemas.plans import Blocker, RuntimeSupport
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint
from preflight.composites import Placed
from preflight.estimates import FLOAT32, INTERPRETER_BYTES
from preflight.families import Family
from preflight.runtimes import RELOAD, support
from preflight.vision import PROCESSOR_FILES, has_processor

IMAGES = "recipe.calibration.image_field"
SERVED = "tests/workers/inference/test_narrowed_vision.py; images: tests/workers/inference/test_vision_models.py"
STAYS = "the vision tower and the projector stay as they are, byte for byte"


def part_recipe_blockers(checkpoint: Checkpoint, recipe: Recipe) -> list[Blocker]:
    """Why a recipe cannot be carried out on a decoder that stands among other parts, by name."""
    placed, found = checkpoint.placed, _image_blockers(checkpoint, recipe)
    if placed is None:
        return found
    whole = placed.composite.model_type
    if recipe.layout == "nemotron":
        message = (
            f"layout 'nemotron' is NVIDIA's class for a text decoder alone, and this is a {whole}; use layout "
            "'portable' or 'full'"
        )
        found.append(Blocker(code="nemotron_family", message=message, param="recipe.steps.0.layout"))
    step = recipe.structure
    if step is not None and placed.composite.unshrunk:
        message = (
            f"method {step.method}: nothing can be removed from the decoder of a {whole}, because "
            f"{placed.composite.unshrunk}; quantise it (gptq, round_to_nearest, int8, nf4), or choose another model"
        )
        found.append(Blocker(code="unsupported_architecture", message=message, param="recipe.steps.0.method"))
    if placed.composite.shares_mlp_width and recipe.layout == "portable" and step and "mlp" in step.resolved_modules:
        message = (
            f"layout 'portable': the projector of a stock {placed.composite.architecture} takes a width from the "
            "decoder's intermediate_size, so a narrower MLP would not load; use layout 'full'"
        )
        found.append(Blocker(code="projector_shares_width", message=message, param="recipe.steps.0.layout"))
    for index, export in enumerate(recipe.exports):
        message = (
            f"export {export.format}: a file of the decoder alone would lose the other parts of this {whole}; "
            "leave the export out"
        )
        found.append(Blocker(code="export_of_part", message=message, param=f"recipe.exports.{index}"))
    return found


def _image_blockers(checkpoint: Checkpoint, recipe: Recipe) -> list[Blocker]:
    """Why the calibration's images could not be shown to this model."""
    key, found = recipe.calibration.image_field, list[tuple[str, str, str]]()
    if key is None:
        return []
    if checkpoint.placed is None:
        found.append(("images_need_vision_model", "this model has no eyes; leave image_field out", IMAGES))
    elif checkpoint.placed.composite.blind:
        why = (
            f"in a {checkpoint.placed.composite.model_type} {checkpoint.placed.composite.blind}; leave image_field out"
        )
        found.append(("images_not_walked", why, IMAGES))
    elif not has_processor(checkpoint.side_files):
        found.append(("processor_missing", f"{' and '.join(PROCESSOR_FILES)} are both absent; push one", IMAGES))
    if recipe.trials:
        why = "a target for perplexity is judged on text held out of the calibration; name a sparsity instead"
        found.append(("images_cannot_search", why, "recipe.steps.0.target.perplexity_increase"))
    return [
        Blocker(code=code, message=f"calibration.image_field {key!r}: {why}", param=param) for code, why, param in found
    ]


def part_warnings(placed: Placed | None, recipe: Recipe) -> list[str]:
    """What a user of a model with several parts should know before the job."""
    if placed is None:
        return []
    if recipe.calibration.image_field is not None:
        return ["judged_on_text: calibrated on images and text, but judged on text only"]
    return [
        f"text_only_calibration: calibrated and judged on text only; what the decoder loses on "
        f"{placed.composite.reads} tokens is not measured"
    ]


def seeing_bytes(checkpoint: Checkpoint, family: Family, recipe: Recipe) -> int:
    """Resident bytes while images are encoded, without what one image needs on its way; 0 where none are.

    All but the decoder's blocks, of which one is loaded, in float32.
    """
    placed = checkpoint.placed
    if placed is None or recipe.calibration.image_field is None:
        return 0
    loaded = [
        entry.parameters
        for name, entry in checkpoint.decoder.tensors.items()
        if not name.startswith(f"{family.blocks}.") or name.startswith(family.block_prefix(0))
    ]
    return INTERPRETER_BYTES + FLOAT32 * (sum(loaded) + sum(entry.parameters for entry in placed.others.values()))


def part_runtimes(placed: Placed | None, layout: str) -> tuple[RuntimeSupport, ...]:
    """Which runtimes load the result; empty where the model is a decoder alone."""
    return () if placed is None else tuple(_rows(placed, layout))


def _rows(placed: Placed, layout: str) -> Iterator[RuntimeSupport]:
    yield support("modepress", "verified", "the service loads it by its id", "modepress chat MODEL", SERVED)
    stock = f"{placed.composite.architecture}, no remote code; {STAYS}"
    if layout == "full" or placed.composite.ours:
        refused = "no stock class has widths per block and rotary pairs per head"
        if placed.composite.ours:
            refused = f"it has no {placed.composite.architecture}"
        test = "tests/compression/test_composites.py"
        yield support("transformers", "refused", refused, "import compression.runtime first", test)
        yield support("vllm", "refused", refused, None, "not run")
        return
    yield support("transformers", "verified", stock, "transformers serve FOLDER", RELOAD)
    why = f"{placed.composite.architecture} with an ordinary width in text_config"
    yield support("vllm", "believed", why, "vllm serve FOLDER", "not run here")
