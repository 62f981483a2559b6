"""Mode refined, attention: rotary pairs and projections of the corrected query and key, values and their output."""

from dataclasses import replace

import torch
from torch import Tensor

from api_schemas.reports import ModuleReport
from compression.core.blockwise import chunks
from compression.core.refit import Folds, Refitted, RunningCross
from compression.core.selection import symmetric_factor
from compression.core.statistics import BlockStatistics, RunningGram
from compression.core.taps import run_until
from compression.methods.modegpt import module_report
from compression.methods.modegpt_decompositions import value_output
from compression.methods.modegpt_streams import Streams, floored, store, weight_and_bias


def solve_query_key(at: Streams, index: int, new: dict[str, Tensor]) -> ModuleReport:
    """Narrow query and key, in place, by what the corrected ones say of the compressed stream."""
    size = at.size
    statistics = BlockStatistics(at.family, size, at.share, gram=False)
    if size.rotary_in(index) < size.head_dim:  # channels that no position turns are projected: that takes covariances
        statistics.query = RunningGram(size.heads, size.head_dim)
        statistics.key = RunningGram(size.kv_heads, size.head_dim)
    if at.method.shapes[index].query_key_rank == size.head_dim:  # all channels stay: nothing to observe
        return at.method.narrow_query_key(index, new, statistics)
    block = at.model.block(index, new)
    with statistics.watching(block):
        for part in chunks(at.compressed):
            run_until(at.model, block, at.compressed[part], index, at.family.attention.value)
    return at.method.narrow_query_key(index, new, statistics)


def solve_value_output(
    at: Streams, index: int, new: dict[str, Tensor], state: dict[str, Tensor], solves: list[Refitted]
) -> ModuleReport:
    """Narrow value and output, in place: basis from the corrected output's error in the metric, then one re-fit.

    Args:
        at: the streams.
        index: which block.
        new: its tensors, query and key narrowed already.
        state: its original tensors.
        solves: what the part's re-fits needed, to which this one's is added.
    """
    size, rank, output = at.size, at.method.shapes[index].value_output_rank, at.family.attention.output
    W, bias = weight_and_bias(state, output)
    block = at.narrow(index, new, value_output_rank=size.head_dim, mlp_width=size.mlp_width)
    running = RunningCross(W.shape[1], W.shape[0], at.share)
    for part in chunks(at.compressed):
        heard = at.halves.without_attention_output(block, at.compressed[part], index)
        mixed = heard.inputs[output]
        aim, weights = at.aim("attention", part, heard.rest)
        running.add(mixed, at.target(aim, mixed, W, bias), weights)
    folds, damping = running.folds(), 0.0
    solved = folds.refit(W, bias, at.config.output_ridge)
    if rank < size.head_dim:
        start, folds, damping, factors = _narrow_values(at, index, new, solved.weight, folds, rank)
        solved = folds.refit(start, solved.bias, at.config.output_ridge, like=solved)
    error = folds.whole.relative_error(solved.weight, solved.bias)
    if rank < size.head_dim:
        solved = replace(solved, weight=solved.weight / factors.repeat_interleave(size.group, dim=0).flatten())
    solves.append(solved)
    store(new, output, solved)
    return module_report("value_output", size.head_dim, rank, error, damping)


def _narrow_values(
    at: Streams, index: int, new: dict[str, Tensor], W: Tensor, folds: Folds, rank: int
) -> tuple[Tensor, Folds, float, Tensor]:
    """Replace the value channels by the best `rank` per key/value head, times the factors that the recipe asks for.

    Returns:
        Output weight and folds for channels without the factors, the damping, and the factors `[kv_heads, rank]`.
    """
    size = at.size
    metrics = at.metrics(index)
    root = None if metrics is None else symmetric_factor(floored(metrics.attention))
    by_head = folds.whole.gram.reshape(size.heads, size.head_dim, size.heads, size.head_dim)
    heads = W.reshape(size.hidden, size.kv_heads, size.group, size.head_dim)
    maps, sizes, damping = [], [], 0.0
    for head in range(size.kv_heads):
        own = range(head * size.group, (head + 1) * size.group)
        G = torch.stack([by_head[query, :, query] for query in own]).mean(dim=0)
        outputs = heads[:, head].transpose(0, 1)
        seen = outputs if root is None else root.T @ outputs
        solved = value_output(G, seen, rank)
        maps.append(solved.basis)
        sizes.append(solved.singular_values)
        damping = max(damping, solved.damping)
    basis, factors = torch.stack(maps), at.method.value_factors(sizes)
    at.method.apply_maps(new, at.family.attention.value, basis * factors[:, None])
    inverse = torch.linalg.pinv(basis).repeat_interleave(size.group, dim=0)
    start = torch.einsum("hrc,dhc->dhr", inverse, W.reshape(size.hidden, size.heads, size.head_dim))
    mapping = torch.block_diag(*basis.repeat_interleave(size.group, dim=0))
    return start.reshape(size.hidden, -1), folds.mapped(mapping), damping, factors
