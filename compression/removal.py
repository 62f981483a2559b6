"""Whole blocks out before the others are narrowed: which, and the model that is left.

Reference: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
sec. 3: the blocks of least influence `1 − E[cos(input, output)]` go, all at once, as measured on the original.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from api_schemas.recipe import Recipe
from compression.core.block_store import FolderBlockStore
from compression.core.blockwise import profile
from compression.core.streamed_model import StreamedModel
from compression.prepare import Prepared
from compression.stages import Stages
from preflight.removal import remaining_config, remaining_step
from preflight.safetensors_header import TensorEntry


def remove_blocks(
    recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages
) -> tuple[Recipe, Prepared, tuple[int, ...]]:
    """Measure block influence on the original, take out the least influential blocks, and hand on what is left.

    The choice is kept in the store, so that a later attempt removes the same blocks.

    Returns:
        The recipe for what stays, it, and which blocks went; without removal recipe and model as they came.
    """
    step = recipe.structure
    if step is None or not step.remove_blocks:
        return recipe, ready, ()
    choice = store.kept("removed")
    if choice is None:
        with stages.stage("calibrating", "measuring which blocks do least"):
            choice = {"blocks": torch.tensor(_least_influential(ready, step.remove_blocks, stages))}
            store.keep("removed", choice)
    removed = tuple(choice["blocks"].tolist())
    kept = [index for index in range(ready.model.blocks) if index not in removed]
    config = remaining_config(ready.family, ready.checkpoint.config, kept)
    model = StreamedModel(ready.model.folder, ready.family, _renumbered(ready, kept), config, ready.model.device)
    left = remaining_step(step, ready.model.blocks)
    return (
        recipe.model_copy(update={"steps": (left, *recipe.steps[1:])}),
        replace(ready, checkpoint=replace(ready.checkpoint, config=config, tensors=dict(model.tensors)), model=model),
        removed,
    )


def _least_influential(ready: Prepared, count: int, stages: Stages) -> list[int]:
    """The blocks of least influence, ascending by number; of equals the later one goes."""
    size, total = ready.family.dimensions(ready.checkpoint.config), ready.model.blocks
    profiled = profile(
        ready.model,
        size,
        ready.calibration.embed(ready.model, ready.share.windows),
        lambda index: stages.block(f"profiled block {index + 1} of {total}", index, total),
        ready.share,
    )
    influence = [one.influence.value() for one in profiled]
    return sorted(sorted(range(total), key=lambda index: (influence[index], -index))[:count])


def _renumbered(ready: Prepared, kept: Sequence[int]) -> dict[str, TensorEntry]:
    """The original's tensors under the names they have in a model of the kept blocks alone."""
    family, tensors = ready.family, ready.model.tensors
    named = {name: entry for name, entry in tensors.items() if not name.startswith(f"{family.blocks}.")}
    for new, old in enumerate(kept):
        prefix = family.block_prefix(old)
        for name, entry in tensors.items():
            if name.startswith(prefix):
                named[family.block_prefix(new) + name.removeprefix(prefix)] = entry
    return named
