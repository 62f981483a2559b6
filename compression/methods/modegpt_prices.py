"""What each part of a block costs at each width, in nats of next-token loss: the price lists of `core.budget`.

    mlp           the exact re-fit's error after output-aware removal, at every batch (`core.selection`); of experts,
                  which share their width, the sum
    value_output  the discarded singular energy in the metric, at every rank
    query_key     measured: attention is run with fewer channels and its output's error taken in the metric

Each is ½ tr(F E[δδᵀ]) with the part's own error δ, as if the rest of the model stayed whole.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from api_schemas.plans import BlockShape
from compression.core.blockwise import chunks
from compression.core.budget import PriceList
from compression.core.selection import removal_order, symmetric_factor
from compression.core.sensitivity import Metrics
from compression.core.statistics import BlockStatistics
from compression.core.streamed_model import StreamedModel
from compression.core.taps import run_until
from compression.methods.modegpt import Modegpt
from compression.methods.modegpt_decompositions import value_output
from preflight.shapes import BlockCosts, width_choices

MEASURED_SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 0.875)  # of a head's pairs removed


def price_block(
    model: StreamedModel,
    method: Modegpt,
    costs: BlockCosts,
    modules: Sequence[str],
    index: int,
    block: nn.Module,
    inputs: Tensor,
    statistics: BlockStatistics,
    metrics: Metrics,
) -> dict[str, PriceList]:
    """Price lists of the parts that may shrink, from one block's statistics and metrics.

    Args:
        model: the original.
        method: names, sizes and options; its shapes are not read.
        costs: parameters per unit of width.
        modules: the parts that may shrink.
        index: which block.
        block: it, loaded.
        inputs: `[windows, tokens, hidden]` of it.
        statistics: of it on these inputs.
        metrics: of its two outputs.
    """
    lists: dict[str, PriceList] = {}
    state = model.block_state(index)
    for module in modules:
        if module == "mlp":
            lists[module] = _mlp(method, costs, state, statistics, metrics)
        elif module == "value_output":
            lists[module] = _value_output(method, costs, state, statistics, metrics)
        else:
            lists[module] = _query_key(model, method, costs, index, block, state, inputs, statistics, metrics)
    return lists


def _mlp(
    method: Modegpt, costs: BlockCosts, state: dict[str, Tensor], statistics: BlockStatistics, metrics: Metrics
) -> PriceList:
    """Of all experts together, which keep the same width; an expert that the sample never saw has no price."""
    size = method.size
    known = {0: 0.0, size.mlp_width: 0.0}
    for names, gram, weight in zip(method.family.mlps(size), statistics.experts, metrics.routing, strict=True):
        if not gram.tokens:
            continue
        D, C = state[f"{names.down}.weight"].double(), gram.mean()[0]
        removal = removal_order(C, D, metrics.mlp, method.config.resolved_round_to)
        for width, loss in zip(removal.widths, removal.losses, strict=True):
            known[width] = known.get(width, 0.0) + weight * loss / 2
        known[0] += weight * float((metrics.mlp * (D @ C @ D.T)).sum()) / 2  # without units the output is lost whole
    widths = width_choices(original_shape(method), method.config, "mlp")
    return _list(widths, [_between(known, width) for width in widths], size.mlp_width, costs.per_mlp_unit)


def _value_output(
    method: Modegpt, costs: BlockCosts, state: dict[str, Tensor], statistics: BlockStatistics, metrics: Metrics
) -> PriceList:
    size = method.size
    root = symmetric_factor(metrics.attention)
    O = state[f"{method.family.attention.output}.weight"].double()  # noqa: E741 (the paper's letter)
    heads = O.reshape(size.hidden, size.kv_heads, size.group, size.head_dim)
    ranks = width_choices(original_shape(method), method.config, "value_output")
    prices = [0.0] * len(ranks)
    for head, G in enumerate(statistics.mixed_by_group()):
        seen = root.T @ heads[:, head].transpose(0, 1)
        energy = value_output(G, seen, size.head_dim).singular_values.square()
        for at, rank in enumerate(ranks[1:], start=1):
            prices[at] += float(energy[rank:].sum()) / 2
    return _list(ranks, prices, size.head_dim, costs.per_value_output_rank)


def _query_key(
    model: StreamedModel,
    method: Modegpt,
    costs: BlockCosts,
    index: int,
    block: nn.Module,
    state: dict[str, Tensor],
    inputs: Tensor,
    statistics: BlockStatistics,
    metrics: Metrics,
) -> PriceList:
    size = method.size
    output = block.get_submodule(method.family.attention.output)
    part = next(chunks(inputs))
    whole = output(run_until(model, block, inputs[part], index, method.family.attention.output))
    known = {size.head_dim: 0.0}
    ranks = width_choices(original_shape(method), method.config, "query_key")
    for rank in (*(2 * round((1 - share) * size.head_dim / 2) for share in MEASURED_SHARES), ranks[-1]):
        if not ranks[-1] <= rank < size.head_dim or rank in known:
            continue
        shape = original_shape(method).model_copy(update={"query_key_rank": rank})
        trial = Modegpt(method.config, method.family, size, [shape] * size.blocks)
        new = dict(state)
        trial.narrow_query_key(index, new, statistics)
        narrow = model.resized_block(index, new, shape.model_dump(), trial.scaling(index))
        mixed = run_until(model, narrow, inputs[part], index, method.family.attention.output)
        error = (output(mixed) - whole).reshape(-1, size.hidden).double()
        known[rank] = float(((error @ metrics.attention) * error).sum()) / len(error) / 2
    return _list(ranks, [_between(known, rank) for rank in ranks], size.head_dim, costs.per_query_key_rank)


def original_shape(method: Modegpt) -> BlockShape:
    """The widths of an uncompressed block."""
    size = method.size
    return BlockShape(mlp_width=size.mlp_width, query_key_rank=size.head_dim, value_output_rank=size.head_dim)


def _between(known: dict[int, float], width: int) -> float:
    """Price at a width between two priced ones, by the straight line."""
    if width in known:
        return known[width]
    upper, lower = next((a, b) for a, b in pairwise(sorted(known, reverse=True)) if b < width < a)
    share = (upper - width) / (upper - lower)
    return (1 - share) * known[upper] + share * known[lower]


def _list(widths: Sequence[int], prices: Sequence[float], whole: int, per_unit: int) -> PriceList:
    rising = torch.cummax(torch.tensor(list(prices), dtype=torch.float64), dim=0).values.tolist()
    return PriceList(tuple(widths), tuple((whole - width) * per_unit for width in widths), tuple(rising))
