"""Budgets that need data, and the walk that spends them: one stream of hidden states, or two."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from api_schemas.methods import ModegptConfig
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from compression.core.allocation import allocate
from compression.core.block_store import FolderBlockStore
from compression.core.blockwise import OneStream, profile, share_of_windows
from compression.core.budget import PriceList, spend
from compression.core.picture_windows import seeing
from compression.core.placement import moved
from compression.core.protocols import Walker
from compression.core.sensitivity import Metrics, walk_backward
from compression.core.statistics import BlockStatistics
from compression.methods.modegpt import Modegpt
from compression.methods.modegpt_decompositions import keep_pairs
from compression.methods.modegpt_prices import price_block
from compression.methods.modegpt_refined import TwoStreams
from compression.prepare import Prepared
from compression.stages import Stages
from preflight.estimates import sample_windows
from preflight.shapes import block_costs, dense_shape, most_per_block, shapes_for


def narrowing(recipe: Recipe) -> ModegptConfig:
    """The recipe's step that changes widths; only a recipe that has one is planned here."""
    assert recipe.structure is not None  # noqa: S101
    return recipe.structure


def choose_method(recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> Modegpt:
    """Fix widths and shared rotary pairs; walks the original model where they depend on data."""
    step, size = narrowing(recipe), ready.family.dimensions(ready.checkpoint.config)
    shapes, shared = ready.plan.blocks, None
    shares_pairs = step.layout == "portable" and shapes[0].query_key_rank < size.head_dim
    if step.resolved_allocation == "block_influence" or shares_pairs:
        influence, scores = _profile(ready, store, stages)
        if step.resolved_allocation == "block_influence":
            costs = block_costs(ready.family, ready.checkpoint.config)
            dense = dense_shape(ready.family, ready.checkpoint.config)
            most = most_per_block(costs, dense, step, ready.plan.modules)
            sparsities = allocate(influence.tolist(), step.known_sparsity, step.temperature, most)
            shapes = shapes_for(ready.family, ready.checkpoint.config, step, sparsities)
        if shares_pairs:
            # every head of every block that rotates votes with the same weight
            scores = scores[[size.rotary_in(block) > 0 for block in range(size.blocks)]]
            votes = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=(0, 1))
            shared = keep_pairs(votes[None], shapes[0].query_key_rank)[0]
    if step.minds_the_loss or step.resolved_allocation == "marginal_error":
        measure_sensitivity(recipe, ready, store, stages)
    if step.resolved_allocation == "marginal_error":
        shapes = _cheapest_shapes(recipe, ready, store)
    return Modegpt(step, ready.family, size, shapes, shared)


def choose_walker(recipe: Recipe, ready: Prepared, method: Modegpt, store: FolderBlockStore) -> Walker:
    """The walk of the recipe's mode, with both hands at the embeddings."""
    step, share = narrowing(recipe), ready.share
    hidden = ready.calibration.embed(ready.model, share.windows)
    if step.mode == "reference":
        return OneStream(ready.model, method, method.size, hidden, share, propagation=step.propagation)
    metrics = _metrics_of(store, ready.model.device) if step.minds_the_loss else lambda _: None
    return TwoStreams(ready.model, method, hidden, metrics, share)


def _profile(ready: Prepared, store: FolderBlockStore, stages: Stages) -> tuple[Tensor, Tensor]:
    """Block influence `[blocks]` and pair scores `[blocks, kv_heads, head_dim / 2]`; kept for later attempts."""
    kept = store.kept("profile")
    if kept is None:
        size = ready.family.dimensions(ready.checkpoint.config)
        total = ready.model.blocks
        with stages.stage("calibrating", "profiling the original model"):
            taken = profile(
                ready.model,
                size,
                ready.calibration.embed(ready.model, ready.share.windows),
                lambda index: stages.block(f"profiled block {index + 1} of {total}", index, total),
                ready.share,
            )
        influence = torch.tensor([one.influence.value() for one in taken], dtype=torch.float64)
        scores = torch.stack([one.pair_scores() for one in taken])
        kept = {"influence": influence, "scores": scores}
        store.keep("profile", kept)
    kept = moved(kept, ready.model.device)
    return kept["influence"], kept["scores"]


def measure_sensitivity(recipe: Recipe, ready: Prepared, store: FolderBlockStore, stages: Stages) -> None:
    """Metrics and price lists of every block into the store; the last file says that all are there."""
    step, total = narrowing(recipe), ready.model.blocks
    if store.kept(_sensitivity(0)) is not None:  # the walk goes backward: block 0 is written last
        return
    tokens = ready.calibration.tokens[: sample_windows(recipe)]
    share = share_of_windows(ready.share.group, tokens)
    size = ready.family.dimensions(ready.checkpoint.config)
    costs = block_costs(ready.family, ready.checkpoint.config)
    method = Modegpt(step, ready.family, size, ready.plan.blocks)
    identity = torch.eye(size.hidden, dtype=torch.float64)

    def visit(
        index: int, block: torch.nn.Module, inputs: Tensor, statistics: BlockStatistics, metrics: Metrics
    ) -> None:
        if not share.leads:  # what is measured anew below is measured on the first windows
            return
        used = metrics if step.minds_the_loss else replace(metrics, attention=identity, mlp=identity)
        tensors = {"attention": metrics.attention.float(), "mlp": metrics.mlp.float()}
        if step.resolved_allocation == "marginal_error":
            lists = price_block(ready.model, method, costs, ready.plan.modules, index, block, inputs, statistics, used)
            for module, one in lists.items():
                tensors[f"{module}.widths"] = torch.tensor(one.widths)
                tensors[f"{module}.saved"] = torch.tensor(one.saved)
                tensors[f"{module}.prices"] = torch.tensor(one.prices, dtype=torch.float64)
        store.keep(_sensitivity(index), tensors)
        stages.block(f"measured block {index + 1} of {total}", total - 1 - index, total)

    with stages.stage("calibrating", "measuring what the loss minds"):
        walk_backward(seeing(ready.model, ready.calibration, share.windows), size, tokens[share.windows], visit, share)


def price_lists(ready: Prepared, store: FolderBlockStore) -> list[PriceList]:
    """What each part of each block costs at each width, block by block, as it was measured before."""
    lists: list[PriceList] = []
    for index in range(ready.model.blocks):
        tensors = _measured(store, index)
        for module in ready.plan.modules:
            columns = (tensors[f"{module}.{column}"].tolist() for column in ("widths", "saved", "prices"))
            lists.append(PriceList(*(tuple(column) for column in columns)))
    return lists


def _cheapest_shapes(recipe: Recipe, ready: Prepared, store: FolderBlockStore) -> tuple[BlockShape, ...]:
    """Spend the recipe's sparsity where it costs least, over all blocks and the parts that it names."""
    modules, lists = ready.plan.modules, price_lists(ready, store)
    dense = dense_shape(ready.family, ready.checkpoint.config)
    whole = block_costs(ready.family, ready.checkpoint.config).parameters(dense) * ready.model.blocks
    chosen = iter(spend(lists, round(narrowing(recipe).known_sparsity * whole)))
    fields = {"mlp": "mlp_width", "query_key": "query_key_rank", "value_output": "value_output_rank"}
    return tuple(
        dense.model_copy(update={fields[module]: next(chosen) for module in modules}) for _ in range(ready.model.blocks)
    )


def _metrics_of(store: FolderBlockStore, device: torch.device) -> Callable[[int], Metrics]:
    def read(index: int) -> Metrics:
        tensors = moved(_measured(store, index), device)
        return Metrics(tensors["attention"].double(), tensors["mlp"].double())

    return read


def _sensitivity(index: int) -> str:
    return f"sensitivity-{index:05d}"


def _measured(store: FolderBlockStore, index: int) -> dict[str, Tensor]:
    tensors = store.kept(_sensitivity(index))
    if tensors is None:
        raise RuntimeError(f"what was measured of block {index} vanished from {store.folder}")
    return tensors
