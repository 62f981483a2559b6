"""MoDeGPT: each pair of linears in a block is replaced by a narrower pair, in closed form.

Reference: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025,
arXiv 2408.09632. Type I (Algorithm 1, Nyström), type II (Algorithm 2, column-row), type III (Algorithm 3, two SVDs).

Notation (weights as torch stores them, `[out_features, in_features]`):
    C  `[m, m]`      correlation E[a aᵀ] of down_proj's input a
    D  `[d, m]`      down_proj.weight
    J  `[k]`         kept MLP units, ascending
    E_q, E_k `[..., d_h]`  mean energy per query/key channel
    G  `[d_h, d_h]`  correlation of one key/value head's v_proj output, bias included; G = RᵀR
    V  `[d_h, d]`    that head's rows of v_proj.weight
    O  `[g, d, d_h]` o_proj.weight of the g query heads that share it

Where this differs from the paper, and why (all equal to it in exact arithmetic unless said):
    leverage scores come from one Cholesky factor, `s = 1 − λ diag((C+λI)⁻¹)`, with λ relative to the mean diagonal;
    ‖C_q^{1/2}[:, i]‖ is √C_q[i, i], so type II needs energies only, and a rotary pair's energy does not change under
    the rotation; type III works in the head's own d_h channels instead of d × d roots, which also carries v_proj's
    bias exactly; under grouped-query attention all heads of a group share one subspace, found jointly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from api_schemas.reports import ModuleReport
from compression.core.linalg import factorize
from compression.core.protocols import Solution
from compression.core.statistics import BlockStatistics
from preflight.families import Family
from preflight.families.spec import Dimensions


@dataclass(frozen=True)
class Nystrom:
    """Result of type I: kept units, the re-fitted down projection, and what it loses."""

    kept: Tensor
    down: Tensor
    relative_error: float
    damping: float


def leverage_scores(C: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores `[C (C + λI)⁻¹]_ii`, λ = ridge · mean(diag C).

    >>> [round(s, 12) for s in leverage_scores(torch.diag(torch.tensor([3.0, 1.0]).double()), 0.5).tolist()]
    [0.75, 0.5]
    """
    scale = ridge * C.diagonal().mean()
    damped = C + scale * torch.eye(len(C), dtype=C.dtype, device=C.device)
    return 1.0 - scale * factorize(damped, "MLP correlation").inverse_diagonal()


def nystrom(C: Tensor, D: Tensor, width: int, ridge: float) -> Nystrom:
    """Keep `width` MLP units and re-fit the down projection to their activations (Algorithm 1).

    Args:
        C: `[m, m]` float64 correlation of down_proj's input.
        D: `[d, m]` float64 down_proj.weight.
        width: units to keep.
        ridge: of the scores, see `leverage_scores`.

    Returns:
        Kept units ascending, `[d, width]` weight minimising ‖a Dᵀ − a_J D'ᵀ‖ over the calibration tokens, and the
        relative residual by the Schur complement `D (C − C_:J C_JJ⁻¹ C_J:) Dᵀ`.
    """
    kept = torch.topk(leverage_scores(C, ridge), width).indices.sort().values
    target = C[kept] @ D.T  # C_J: Dᵀ, [k, d]
    factor = factorize(C[kept][:, kept], "MLP correlation of the kept units")
    down = factor.solve(target).T
    whole = torch.sum((D @ C) * D)
    # ‖aDᵀ − a_J D'ᵀ‖² = tr(DCDᵀ) − 2 tr(D'C_J:Dᵀ) + tr(D'C_JJD'ᵀ); exact for damped solutions too
    lost = whole - 2 * torch.sum(down.T * target) + torch.sum((down @ C[kept][:, kept]) * down)
    return Nystrom(kept, down, float((lost.clamp_min(0) / whole.clamp_min(1e-300)).sqrt()), factor.damping)


def keep_pairs(scores: Tensor, rank: int) -> Tensor:
    """The `rank / 2` best pairs of each head, ascending: `[kv_heads, rank / 2]`."""
    return torch.topk(scores, rank // 2, dim=-1).indices.sort(dim=-1).values


def channels_of(pairs: Tensor, head_dim: int) -> Tensor:
    """Channels of the kept pairs in rotate-half order, `[..., rank]`: first halves, then second halves.

    >>> channels_of(torch.tensor([0, 3]), 8).tolist()
    [0, 3, 4, 7]
    """
    return torch.cat((pairs, pairs + head_dim // 2), dim=-1)


@dataclass(frozen=True)
class ValueOutput:
    """Result of type III for one key/value head: `basis` maps old value channels to new ones."""

    basis: Tensor
    output: Tensor
    lost: float
    whole: float
    damping: float


def value_output(G: Tensor, O: Tensor, rank: int) -> ValueOutput:  # noqa: E741 (the paper's letter)
    """Best rank-`rank` value channels for all heads that share them (Algorithm 3 in head space, joint over a group).

    Args:
        G: `[d_h, d_h]` float64 correlation of the head's v_proj output.
        O: `[g, d, d_h]` float64 slices of o_proj.weight.
        rank: channels to keep.

    Returns:
        `basis [d_h, rank]` with `V' = basisᵀ V`, `b' = basisᵀ b`; `output [g, d, rank]`; squared error and energy:
        Σ over the group of ‖v Oᵀ − v' O'ᵀ‖², which is the discarded singular energy of R Oᵀ.
    """
    factor = factorize(G, "value correlation")
    R = factor.lower.T
    M = R @ O.permute(2, 0, 1).reshape(O.shape[2], -1)  # R [O_1ᵀ | … | O_gᵀ], [d_h, g·d]
    energy, U = torch.linalg.eigh(M @ M.T)
    energy, U = energy.flip(0).clamp_min(0), U.flip(1)
    kept = U[:, :rank]
    basis = torch.linalg.solve_triangular(R, kept, upper=True)
    output = (kept.T @ M).reshape(rank, O.shape[0], O.shape[1]).permute(1, 2, 0)
    return ValueOutput(basis, output, float(energy[rank:].sum()), float(energy.sum()), factor.damping)


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

        Layout `portable` runs in stock code, which divides by √rank: `solve` folds √(rank/d_h) into the query.
        """
        width = self.shapes[index].query_key_rank if self.config.layout == "portable" else self.size.head_dim
        return float(width**-0.5)

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
        reports = [
            self._query_key(self.shapes[index], new, statistics),
            self._value_output(self.shapes[index], new, statistics),
            self._mlp(self.shapes[index], new, statistics),
        ]
        return Solution(new, tuple(reports))

    def _query_key(self, shape: BlockShape, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, names, rank = self.size, self.family.attention, shape.query_key_rank
        scores = statistics.pair_scores()
        if self.shared_pairs is not None:
            pairs = self.shared_pairs.expand(size.kv_heads, -1)
        else:
            pairs = keep_pairs(scores, rank)
        kept = scores.gather(-1, pairs).square().sum() / scores.square().sum().clamp_min(1e-300)
        channels = channels_of(pairs, size.head_dim)
        fold = (rank / size.head_dim) ** 0.5 if self.config.layout == "portable" else 1.0
        for linear, heads, per_group in ((names.query, size.heads, size.group), (names.key, size.kv_heads, 1)):
            index = channels.repeat_interleave(per_group, dim=0)  # one row of channels per head
            for kind in ("weight", "bias"):
                name = f"{linear}.{kind}"
                if name in state:
                    rows = state[name].reshape(heads, size.head_dim, -1)
                    chosen = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
                    if linear == names.query and fold != 1.0:
                        chosen = (chosen.double() * fold).to(rows.dtype)
                    state[name] = chosen.reshape(heads * rank, *state[name].shape[1:])
        state[f"{names.query.rpartition('.')[0]}.rotary_pairs"] = pairs.contiguous().clone()
        error = float((1 - kept).clamp_min(0).sqrt())
        return _report("query_key", size.head_dim, rank, error, 0.0)

    def _value_output(self, shape: BlockShape, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, names, rank = self.size, self.family.attention, shape.value_output_rank
        if rank == size.head_dim:
            return _report("value_output", rank, rank, 0.0, 0.0)
        value, output = f"{names.value}.weight", f"{names.output}.weight"
        bias = f"{names.value}.bias"
        V = state[value].double().reshape(size.kv_heads, size.head_dim, -1)
        O = state[output].double().reshape(size.hidden, size.kv_heads, size.group, size.head_dim)  # noqa: E741
        solved = [value_output(G, O[:, head].transpose(0, 1), rank) for head, G in enumerate(statistics.value.mean())]
        basis = torch.stack([one.basis for one in solved])
        new_output = torch.stack([one.output for one in solved])  # [kv_heads, g, d, rank]
        dtype = state[value].dtype
        state[value] = torch.einsum("hcr,hcd->hrd", basis, V).reshape(-1, size.hidden).to(dtype)
        if bias in state:
            b = state[bias].double().reshape(size.kv_heads, size.head_dim)
            state[bias] = torch.einsum("hcr,hc->hr", basis, b).reshape(-1).to(dtype)
        state[output] = new_output.permute(2, 0, 1, 3).reshape(size.hidden, -1).to(state[output].dtype)
        error = (sum(one.lost for one in solved) / max(sum(one.whole for one in solved), 1e-300)) ** 0.5
        return _report("value_output", size.head_dim, rank, error, max(one.damping for one in solved))

    def _mlp(self, shape: BlockShape, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, names, width = self.size, self.family.mlp, shape.mlp_width
        if width == size.mlp_width:
            return _report("mlp", width, width, 0.0, 0.0)
        down = f"{names.down}.weight"
        solved = nystrom(statistics.mlp.mean()[0], state[down].double(), width, self.config.ridge)
        state[down] = solved.down.to(state[down].dtype)
        for linear in (names.gate, names.up):
            for name in (f"{linear}.weight", f"{linear}.bias"):
                if name in state:
                    state[name] = state[name][solved.kept]
        return _report("mlp", size.mlp_width, width, solved.relative_error, solved.damping)


def _report(module: str, before: int, after: int, error: float, damping: float) -> ModuleReport:
    return ModuleReport(
        module=module, width_before=before, width_after=after, relative_output_error=error, damping=damping
    )
