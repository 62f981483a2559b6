"""MoDeGPT: each pair of linears in a block is replaced by a narrower pair, in closed form.

Reference: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025,
arXiv 2408.09632. Type I (Algorithm 1, Nyström), type II (Algorithm 2, column-row), type III (Algorithm 3, two SVDs).

The mathematics, its notation and where it differs from the paper stand in `modegpt_decompositions.py`; here it meets a
block: which tensors, which heads, which experts, and what is reported.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from api_schemas.reports import ModuleReport
from compression.core.protocols import Solution
from compression.core.statistics import BlockStatistics
from compression.core.timeline import span
from compression.methods.modegpt_decompositions import (
    Nystrom,
    QueryKey,
    by_weight_norm,
    channels_of,
    keep_pairs,
    nystrom,
    project_query_key,
    value_factors,
    value_output,
)
from preflight.families import Dimensions, Family


class Modegpt:
    """The method as the blockwise walk calls it: narrows one block's tensors to a planned shape."""

    stage: ClassVar[str] = "structure"

    def __init__(
        self,
        config: ModegptConfig,
        family: Family,
        size: Dimensions,
        shapes: Sequence[BlockShape],
        shared_pairs: Tensor | None = None,
    ) -> None:
        """Fix who gets which width before the first block.

        Args:
            config: the recipe's step.
            family: names of the parts.
            size: the original model's sizes.
            shapes: one per block.
            shared_pairs: `[rank / 2]` rotary pairs for all heads and blocks; None chooses per head.
        """
        self.config, self.family, self.size, self.shapes = config, family, size, shapes
        self.shared_pairs = shared_pairs

    def scaling(self, index: int) -> float:
        """Scale of the attention logits that the narrowed block expects.

        Layout `portable` runs in stock code, which mostly divides by √rank: `solve` folds √(rank/d_h) into the query.
        """
        return self.size.attention_scale / self._fold(index)

    def _fold(self, index: int) -> float:
        if self.config.layout == "full" or self.family.attention_scale is not None:
            return 1.0
        return float((self.shapes[index].query_key_rank / self.size.head_dim) ** 0.5)

    def solve(self, index: int, state: dict[str, Tensor], statistics: BlockStatistics) -> Solution:
        """Narrow one block.

        Args:
            index: which block.
            state: its original tensors in storage dtype, named relative to it.
            statistics: of its calibration activations.

        Returns:
            The narrowed tensors in storage dtype, and what each part lost.
        """
        new = dict(state)
        with span("solve", module="query_key"):
            reports = [self.narrow_query_key(index, new, statistics)]
        with span("solve", module="value_output"):
            reports.append(self._value_output(self.shapes[index], new, statistics))
        with span("solve", module="mlp"):
            reports.append(self._mlp(self.shapes[index], new, statistics))
        return Solution(new, tuple(reports))

    def narrow_query_key(self, index: int, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, names, rank = self.size, self.family.attention, self.shapes[index].query_key_rank
        rotated, width = size.rotary_rank(index, rank), size.rotary_in(index)
        pairs = self._pairs(rotated, statistics)
        if rotated:
            state[f"{names.module}.rotary_pairs"] = pairs.contiguous().clone()
        if rank == size.head_dim:
            untouched = "untouched: normalised per head, so that no channel can go" if size.qk_norm else None
            return module_report("query_key", rank, rank, 0.0, 0.0, untouched)
        parts: list[list[QueryKey]] = [[] for _ in range(size.kv_heads)]
        if width > 0:
            for head, (kept, scores) in enumerate(zip(pairs, statistics.pair_scores(), strict=True)):
                parts[head].append(_choose(channels_of(kept, width), scores, kept, width))
        if width < size.head_dim:
            for head, (Q, K) in enumerate(zip(*statistics.unrotated_covariances(width), strict=True)):
                parts[head].append(project_query_key(Q, K, rank - rotated))
        query = torch.stack([torch.block_diag(*(part.query for part in head)) for head in parts])
        key = torch.stack([torch.block_diag(*(part.key for part in head)) for head in parts])
        self.apply_maps(state, names.query, query * self._fold(index))
        self.apply_maps(state, names.key, key)
        every = [part for head in parts for part in head]
        error = (sum(part.lost for part in every) / max(sum(part.whole for part in every), 1e-300)) ** 0.5
        return module_report("query_key", size.head_dim, rank, error, max(part.damping for part in every))

    def _pairs(self, rotated: int, statistics: BlockStatistics) -> Tensor:
        """Kept rotary pairs `[kv_heads, rotated / 2]`."""
        if self.shared_pairs is not None:
            return self.shared_pairs.expand(self.size.kv_heads, -1)
        return keep_pairs(statistics.pair_scores(), rotated)

    def apply_maps(self, state: dict[str, Tensor], linear: str, maps: Tensor) -> None:
        """Multiply each head's outputs by its key/value head's map `[kv_heads, d_h, rank]`."""
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in state:
                old = state[name]
                rows = old.double().reshape(self.size.kv_heads, -1, self.size.head_dim, old[0].numel())
                new = torch.einsum("kcr,kgcd->kgrd", maps, rows)
                state[name] = new.reshape(-1, *old.shape[1:]).to(old.dtype)

    def _value_output(self, shape: BlockShape, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, names, rank = self.size, self.family.attention, shape.value_output_rank
        if rank == size.head_dim:
            return module_report("value_output", rank, rank, 0.0, 0.0)
        value, output = f"{names.value}.weight", f"{names.output}.weight"
        bias = f"{names.value}.bias"
        V = state[value].double().reshape(size.kv_heads, size.head_dim, -1)
        O = state[output].double().reshape(size.hidden, size.kv_heads, size.group, size.head_dim)  # noqa: E741
        solved = [value_output(G, O[:, head].transpose(0, 1), rank) for head, G in enumerate(statistics.value.mean())]
        factors = self.value_factors([one.singular_values for one in solved])
        basis = torch.stack([one.basis for one in solved]) * factors[:, None]
        new_output = torch.stack([one.output for one in solved]) / factors[:, None, None]  # [kv_heads, g, d, rank]
        dtype = state[value].dtype
        state[value] = torch.einsum("hcr,hcd->hrd", basis, V).reshape(-1, size.hidden).to(dtype)
        if bias in state:
            b = state[bias].double().reshape(size.kv_heads, size.head_dim)
            state[bias] = torch.einsum("hcr,hc->hr", basis, b).reshape(-1).to(dtype)
        state[output] = new_output.permute(2, 0, 1, 3).reshape(size.hidden, -1).to(state[output].dtype)
        error = (sum(one.lost for one in solved) / max(sum(one.whole for one in solved), 1e-300)) ** 0.5
        return module_report("value_output", size.head_dim, rank, error, max(one.damping for one in solved))

    def value_factors(self, singular_values: Sequence[Tensor]) -> Tensor:
        """Factors `[kv_heads, rank]` of the value channels, as the recipe places the singular values."""
        return torch.stack([value_factors(one, self.config.singular_values) for one in singular_values])

    def _mlp(self, shape: BlockShape, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, width = self.size, shape.mlp_width
        counts = tuple(gram.tokens for gram in statistics.experts)
        coverage = counts if self.family.experts else None
        if width == size.mlp_width:
            return module_report("mlp", width, width, 0.0, 0.0, coverage=coverage)
        solved: list[Nystrom] = []
        unseen: list[int] = []
        for expert, (names, gram) in enumerate(zip(self.family.mlps(size), statistics.experts, strict=True)):
            down = f"{names.down}.weight"
            if self.family.experts and gram.tokens < width:  # its re-fit would not be determined
                unseen.append(expert)
                kept = by_weight_norm([state[f"{name}.weight"] for name in names.inputs], state[down], width)
                state[down] = state[down][:, kept]
            else:
                solved.append(nystrom(gram.take_mean()[0], state[down].double(), width, self.config.ridge))
                kept = solved[-1].kept
                state[down] = solved[-1].down.to(state[down].dtype)
            for linear in names.inputs:
                for name in (f"{linear}.weight", f"{linear}.bias"):
                    if name in state:
                        state[name] = state[name][kept]
        error = (sum(one.relative_error**2 for one in solved) / max(1, len(solved))) ** 0.5
        damping = max((one.damping for one in solved), default=0.0)
        return module_report("mlp", size.mlp_width, width, error, damping, not_refitted(unseen, width), coverage)


def not_refitted(experts: Sequence[int], width: int) -> str | None:
    if not experts:
        return None
    return (
        f"experts {', '.join(map(str, experts))} saw fewer calibration tokens than the {width} units they keep: "
        "units kept by weight norm, without a re-fit"
    )


def _choose(channels: Tensor, scores: Tensor, kept: Tensor, width: int) -> QueryKey:
    """Selection of channels as a map; what it loses is the energy of the pairs that are not kept."""
    chosen = torch.eye(width, dtype=torch.float64, device=channels.device)[:, channels]
    whole = float(scores.square().sum())
    return QueryKey(chosen, chosen, max(0.0, whole - float(scores[kept].square().sum())), whole, 0.0)


def module_report(
    module: str,
    before: int,
    after: int,
    error: float,
    damping: float,
    fallback: str | None = None,
    coverage: tuple[int, ...] | None = None,
) -> ModuleReport:
    return ModuleReport(
        module=module,
        width_before=before,
        width_after=after,
        relative_output_error=error,
        damping=damping,
        fallback=fallback,
        coverage=coverage,
    )
