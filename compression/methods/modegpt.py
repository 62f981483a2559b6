"""MoDeGPT: each pair of linears in a block is replaced by a narrower pair, in closed form.

Reference: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025,
arXiv 2408.09632. Type I (Algorithm 1, Nyström), type II (Algorithm 2, column-row), type III (Algorithm 3, two SVDs).

Notation (weights as torch stores them, `[out_features, in_features]`):
    C  `[m, m]`      correlation E[a aᵀ] of down_proj's input a
    D  `[d, m]`      down_proj.weight
    J  `[k]`         kept MLP units, ascending
    E_q, E_k `[..., d_h]`  mean energy per query/key channel
    K  `[n, n]`      covariance of one key head's n channels that no position turns; Q: their queries' correlation
    G  `[d_h, d_h]`  correlation of one key/value head's v_proj output, bias included; G = RᵀR
    V  `[d_h, d]`    that head's rows of v_proj.weight
    O  `[g, d, d_h]` o_proj.weight of the g query heads that share it

Where this differs from the paper, and why (all equal to it in exact arithmetic unless said):
    leverage scores come from one Cholesky factor, `s = 1 − λ diag((C+λI)⁻¹)`, with λ relative to the mean diagonal;
    ‖C_q^{1/2}[:, i]‖ is √C_q[i, i], so type II needs energies only, and a rotary pair's energy does not change under
    the rotation; type III works in the head's own d_h channels instead of d × d roots, which also carries v_proj's
    bias exactly; under grouped-query attention all heads of a group share one subspace, found jointly; query-key
    channels that no position turns (OPT, GPT-2, part of Phi's heads) are not selected but projected, which is optimal.
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
from preflight.families import Dimensions, Family


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


def channels_of(pairs: Tensor, rotary_width: int) -> Tensor:
    """Channels of the kept pairs in rotate-half order, `[..., rank]`: first halves, then second halves.

    >>> channels_of(torch.tensor([0, 3]), 8).tolist()
    [0, 3, 4, 7]
    """
    return torch.cat((pairs, pairs + rotary_width // 2), dim=-1)


@dataclass(frozen=True)
class QueryKey:
    """What type II does to one key/value head: `q' = q A`, `k' = k B`, with A for all query heads that share it."""

    query: Tensor
    key: Tensor
    lost: float
    whole: float
    damping: float


def project_query_key(Q: Tensor, K: Tensor, rank: int) -> QueryKey:
    """Best rank-`rank` query-key channels where no rotation stands between query and key.

    Args:
        Q: `[n, n]` float64, Σ over the sharing heads of E[qᵀ q].
        K: `[n, n]` float64 covariance of the keys.
        rank: channels to keep.

    Returns:
        `A, B [n, rank]` minimising Σ‖q kᵀ − (q A)(k B)ᵀ‖² over independent queries and keys: with Q = R_QᵀR_Q and
        K = R_KᵀR_K, R_Q (I − A Bᵀ) R_Kᵀ is the discarded part of the SVD of R_Q R_Kᵀ.
    """
    of_query, of_key = factorize(Q, "query correlation"), factorize(K, "key covariance")
    R_Q, R_K = of_query.lower.T, of_key.lower.T
    U, S, Vt = torch.linalg.svd(R_Q @ R_K.T)
    root = S[:rank].sqrt()
    A = torch.linalg.solve_triangular(R_Q, U[:, :rank] * root, upper=True)
    B = torch.linalg.solve_triangular(R_K, Vt[:rank].T * root, upper=True)
    energy = S.square()
    return QueryKey(A, B, float(energy[rank:].sum()), float(energy.sum()), max(of_query.damping, of_key.damping))


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
        reports = [
            self.narrow_query_key(index, new, statistics),
            self._value_output(self.shapes[index], new, statistics),
            self._mlp(self.shapes[index], new, statistics),
        ]
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
        basis = torch.stack([one.basis for one in solved])
        new_output = torch.stack([one.output for one in solved])  # [kv_heads, g, d, rank]
        dtype = state[value].dtype
        state[value] = torch.einsum("hcr,hcd->hrd", basis, V).reshape(-1, size.hidden).to(dtype)
        if bias in state:
            b = state[bias].double().reshape(size.kv_heads, size.head_dim)
            state[bias] = torch.einsum("hcr,hc->hr", basis, b).reshape(-1).to(dtype)
        state[output] = new_output.permute(2, 0, 1, 3).reshape(size.hidden, -1).to(state[output].dtype)
        error = (sum(one.lost for one in solved) / max(sum(one.whole for one in solved), 1e-300)) ** 0.5
        return module_report("value_output", size.head_dim, rank, error, max(one.damping for one in solved))

    def _mlp(self, shape: BlockShape, state: dict[str, Tensor], statistics: BlockStatistics) -> ModuleReport:
        size, names, width = self.size, self.family.mlp, shape.mlp_width
        if width == size.mlp_width:
            return module_report("mlp", width, width, 0.0, 0.0)
        down = f"{names.down}.weight"
        solved = nystrom(statistics.mlp.mean()[0], state[down].double(), width, self.config.ridge)
        state[down] = solved.down.to(state[down].dtype)
        for linear in names.inputs:
            for name in (f"{linear}.weight", f"{linear}.bias"):
                if name in state:
                    state[name] = state[name][solved.kept]
        return module_report("mlp", size.mlp_width, width, solved.relative_error, solved.damping)


def _choose(channels: Tensor, scores: Tensor, kept: Tensor, width: int) -> QueryKey:
    """Selection of channels as a map; what it loses is the energy of the pairs that are not kept."""
    chosen = torch.eye(width, dtype=torch.float64)[:, channels]
    whole = float(scores.square().sum())
    return QueryKey(chosen, chosen, max(0.0, whole - float(scores[kept].square().sum())), whole, 0.0)


def module_report(
    module: str, before: int, after: int, error: float, damping: float, fallback: str | None = None
) -> ModuleReport:
    return ModuleReport(
        module=module,
        width_before=before,
        width_after=after,
        relative_output_error=error,
        damping=damping,
        fallback=fallback,
    )
