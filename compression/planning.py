"""Budgets that need data: widths by block influence, and one rotary subset for all heads."""

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from api_schemas.recipe import Recipe
from compression.core.allocation import allocate
from compression.core.block_store import FolderBlockStore, write_durably
from compression.core.blockwise import profile
from compression.methods.modegpt import Modegpt, keep_pairs
from compression.prepare import Prepared
from compression.stages import Stages
from preflight.shapes import shapes_for


def choose_method(recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> Modegpt:
    """Fix widths and shared rotary pairs; walks the original model once where they depend on data."""
    step, size = recipe.steps[0], ready.family.dimensions(ready.checkpoint.config)
    shapes, shared = ready.plan.blocks, None
    shares_pairs = step.layout == "portable" and shapes[0].query_key_rank < size.head_dim
    if step.allocation == "block_influence" or shares_pairs:
        with stages.stage("calibrating", "profiling the original model"):
            influence, scores = _profile(ready, store, stages)
        if step.allocation == "block_influence":
            sparsities = allocate(influence.tolist(), step.sparsity, step.temperature, step.sparsity_cap)
            shapes = shapes_for(ready.family, ready.checkpoint.config, step, sparsities)
        if shares_pairs:
            # every head of every block votes with the same weight
            votes = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=(0, 1))
            shared = keep_pairs(votes[None], shapes[0].query_key_rank)[0]
    return Modegpt(step, ready.family, size, shapes, shared)


def _profile(ready: Prepared, store: FolderBlockStore, stages: Stages) -> tuple[Tensor, Tensor]:
    """Block influence `[blocks]` and pair scores `[blocks, kv_heads, head_dim / 2]`; kept for later attempts."""
    kept = store.folder / "profile.safetensors"
    if not kept.exists():
        size = ready.family.dimensions(ready.checkpoint.config)
        total = ready.model.blocks
        taken = profile(
            ready.model,
            size,
            ready.model.embed(ready.calibration.tokens),
            lambda index: stages.block(f"profiled block {index + 1} of {total}", index, total),
        )
        influence = torch.tensor([one.influence.value() for one in taken], dtype=torch.float64)
        scores = torch.stack([one.pair_scores() for one in taken])
        write_durably(kept, save({"influence": influence, "scores": scores}))
    tensors = load_file(kept)
    return tensors["influence"], tensors["scores"]
