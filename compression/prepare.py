"""Everything that is known, checked and refused before the first block."""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from api_schemas.errors import InsufficientStorage, InvalidRecipe
from api_schemas.plans import Plan
from api_schemas.recipe import Recipe
from api_schemas.reports import TextUse
from compression.core.blockwise import CHUNK_TOKENS, chunk_tokens, share_of_windows, windows_per_chunk
from compression.core.parallel import Alone, Group, Share
from compression.core.picture_encoder import PictureEncoder
from compression.core.picture_rows import picture_rows
from compression.core.picture_windows import load_pictures
from compression.core.placement import CPU, named
from compression.core.self_text import writer
from compression.core.streamed_model import StreamedModel
from compression.core.texts import Windows, assert_disjoint, hold_out, load_windows, text_path
from preflight.checkpoint import Checkpoint, open_checkpoint
from preflight.estimates import SEARCH_SHARE, search_windows
from preflight.families import Family, resolve
from preflight.plans import make_plan, recipe_hash


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first block.

    `checkpoint` is that of the decoder, wherever it stands; `search` is the text on which trials are judged.
    """

    checkpoint: Checkpoint
    family: Family
    plan: Plan
    model: StreamedModel
    calibration: Windows
    evaluation: Windows
    warnings: tuple[str, ...]
    share: Share
    search: Windows | None = None


def versions() -> dict[str, str]:
    """What computed it."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def prepare(
    recipe: Recipe,
    source: Path,
    target: Path,
    model: str,
    *,
    files: Mapping[str, Path],
    roots: Sequence[Path] | None,
    hub_offline: bool,
    group: Group | None = None,
    device: torch.device = CPU,
) -> Prepared:
    """Open the checkpoint, plan, refuse by name, read the texts.

    Raises:
        InvalidRecipe: `too_many_ranks` when some would have nothing to do; `ranks_cannot_search` for trials.
        ModepressError: the first blocker's code with all their messages; `disk_full`; the texts' own errors.
    """
    checkpoint = open_checkpoint(source).decoder
    plan = make_plan(checkpoint, recipe, model=model)
    refuse_blocked(plan)
    _refuse_full_disk(target.parent, plan)
    family = resolve(checkpoint.config)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    write = writer(source, tokenizer, recipe.seed, composite=_sees(checkpoint))

    def windows(text: Any, wanted: int, role: Any) -> Windows:
        return load_windows(
            text,
            wanted,
            tokenizer,
            files=files,
            roots=roots,
            hub_offline=hub_offline,
            role=role,
            write_text=write,
        )

    beyond = search_windows(recipe)
    if recipe.calibration.image_field is None or checkpoint.placed is None:
        calibration = windows(recipe.calibration, recipe.calibration.num_samples + beyond, "calibration")
    else:
        path = text_path(recipe.calibration, files, roots, "calibration")
        rows = picture_rows(path, recipe.calibration, tokenizer, roots)
        encoder = PictureEncoder(source, checkpoint.placed.composite)
        calibration = load_pictures(recipe.calibration, recipe.calibration.num_samples, rows, encoder)
        del encoder  # the walk needs its memory
    evaluation = windows(recipe.evaluation, recipe.evaluation.num_windows, "evaluation")
    assert_disjoint(calibration, evaluation)
    search = None
    if beyond:
        calibration, search = hold_out(calibration, SEARCH_SHARE, recipe.calibration.num_samples)
    warnings = (*plan.warnings, *_shortfalls(calibration.use, evaluation.use), *_smaller_pieces())
    share = _share(group or Alone(), recipe, calibration.tokens)
    streamed = StreamedModel(source, family, checkpoint.tensors, device=device)
    return Prepared(checkpoint, family, plan, streamed, calibration, evaluation, warnings, share, search)


def _refuse_full_disk(folder: Path, plan: Plan) -> None:
    free = shutil.disk_usage(folder).free
    if free < plan.disk_bytes:
        raise InsufficientStorage(
            "disk_full",
            f"{folder} has {free} bytes free, the job needs about {plan.disk_bytes}; free some and submit again",
        )


def _shortfalls(calibration: TextUse, evaluation: TextUse) -> Iterator[str]:
    """What was asked of the texts and could not be had, in words."""
    if calibration.images_left_out:
        yield (
            f"calibration: {calibration.images} images were used; {calibration.images_left_out} did not fit into what "
            "was left of a window and were left out"
        )
    for role, text in (("calibration", calibration), ("evaluation", evaluation)):
        if text.used < text.requested:
            yield f"{role}: {text.requested} windows asked for, {text.used} used: the text has no more"


def _smaller_pieces() -> Iterator[str]:
    """That this run goes on where another ran out of memory."""
    if chunk_tokens() != CHUNK_TOKENS:
        yield (
            f"an earlier attempt ran out of memory: this one runs {chunk_tokens()} tokens at once instead of "
            f"{CHUNK_TOKENS}, and started from the first block"
        )


def refuse_blocked(plan: Plan) -> None:
    """Go no further with a plan that has blockers.

    Raises:
        InvalidRecipe: the first blocker's code with all their messages.
    """
    if plan.blockers:
        first = plan.blockers[0]
        raise InvalidRecipe(first.code, "; ".join(blocker.message for blocker in plan.blockers), first.param)


def _share(group: Group, recipe: Recipe, tokens: torch.Tensor) -> Share:
    if group.size > 1 and recipe.trials:
        raise InvalidRecipe(
            "ranks_cannot_search",
            "a target for perplexity is searched for by one process: start without torchrun, or name a sparsity",
            "recipe.steps.0.target.perplexity_increase",
        )
    windows, length = tokens.shape
    chunks = -(-windows // windows_per_chunk(length))
    if group.size > chunks:
        raise InvalidRecipe(
            "too_many_ranks",
            f"{group.size} ranks cannot share {windows} calibration windows of {length} tokens, which are {chunks} "
            f"chunks: start {chunks} ranks at most, or calibrate on more text",
            "recipe.calibration.num_samples",
        )
    return share_of_windows(group, tokens)


def _sees(checkpoint: Checkpoint) -> bool:
    """Whether it is loaded as a model that sees: those that read tables are causal models."""
    return checkpoint.placed is not None and checkpoint.placed.composite.reads == "image"


def fingerprint(recipe: Recipe, model: str, ready: Prepared) -> str:
    """What the bits of a finished block depend on; blocks made under another one are not looked at."""
    tensors = {name: [entry.dtype, list(entry.shape)] for name, entry in ready.model.tensors.items()}
    facts = [
        recipe_hash(recipe, model),
        dict(ready.checkpoint.config),
        tensors,
        ready.calibration.use.sha256,
        versions(),
        torch.get_num_threads() if ready.model.device == CPU else named(ready.model.device),
    ]
    if ready.search is not None:
        facts.append(ready.search.use.sha256)
    if chunk_tokens() != CHUNK_TOKENS:  # what fits and what judges is parted by chunks
        facts.append({"chunk_tokens": chunk_tokens()})
    if ready.share.group.size > 1:  # float64 sums over ranks round otherwise than those of one process
        facts.append({"ranks": ready.share.group.size})
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
