"""MoDeGPT's three decompositions, as pure functions of statistics and weights.

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

import torch
from torch import Tensor

from compression.core.linalg import energy, factorize


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
    scale = float(ridge * C.diagonal().mean())
    return 1.0 - scale * factorize(C, "MLP correlation", scale).inverse_diagonal()


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
    factor = factorize(C[kept[:, None], kept], "MLP correlation of the kept units")
    down = factor.solve(target).T
    whole = energy(D, C)
    # ‖aDᵀ − a_J D'ᵀ‖² = tr(DCDᵀ) − 2 tr(D'C_J:Dᵀ) + tr(D'C_JJD'ᵀ); with (C_JJ + δI) D'ᵀ = C_J:Dᵀ the last two are
    # − tr(D'C_J:Dᵀ) − δ‖D'‖²
    lost = whole - torch.sum(down.T * target) - factor.added * down.square().sum()
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
    singular_values: Tensor
    lost: float
    whole: float
    damping: float


EXPONENTS = {"output": 0.0, "balanced": 0.5, "value": 1.0}
SMALLEST_SHARE = 1e-6  # of the largest singular value: what a channel without energy is taken for


def value_factors(singular_values: Tensor, place: str) -> Tensor:
    """Factors of the value channels whose inverses go to the output: `(σ / mean σ)^p`, p = 0, ½ or 1.

    >>> value_factors(torch.tensor([6.0, 2.0]).double(), "value").tolist()
    [1.5, 0.5]
    """
    sizes = singular_values.clamp_min(SMALLEST_SHARE * float(singular_values.max()))
    return torch.ones_like(sizes) if float(sizes.max()) == 0.0 else (sizes / sizes.mean()) ** EXPONENTS[place]


def value_output(G: Tensor, O: Tensor, rank: int) -> ValueOutput:  # noqa: E741 (the paper's letter)
    """Best rank-`rank` value channels for all heads that share them (Algorithm 3 in head space, joint over a group).

    Args:
        G: `[d_h, d_h]` float64 correlation of the head's v_proj output.
        O: `[g, d, d_h]` float64 slices of o_proj.weight.
        rank: channels to keep.

    Returns:
        `basis [d_h, rank]` with `V' = basisᵀ V`, `b' = basisᵀ b`; `output [g, d, rank]`, which holds the singular
        values `[rank]`, so that new value channels have energy 1; squared error and energy: Σ over the group of
        ‖v Oᵀ − v' O'ᵀ‖², which is the discarded singular energy of R Oᵀ.
    """
    factor = factorize(G, "value correlation")
    R = factor.lower.T
    M = R @ O.permute(2, 0, 1).reshape(O.shape[2], -1)  # R [O_1ᵀ | … | O_gᵀ], [d_h, g·d]
    energy, U = torch.linalg.eigh(M @ M.T)
    energy, U = energy.flip(0).clamp_min(0), U.flip(1)
    kept = U[:, :rank]
    basis = torch.linalg.solve_triangular(R, kept, upper=True)
    output = (kept.T @ M).reshape(rank, O.shape[0], O.shape[1]).permute(1, 2, 0)
    lost, whole = float(energy[rank:].sum()), float(energy.sum())
    return ValueOutput(basis, output, energy[:rank].sqrt(), lost, whole, factor.damping)


def by_weight_norm(inputs: Sequence[Tensor], down: Tensor, width: int) -> Tensor:
    """The units to keep of an MLP without activations, ascending: of largest product of their weights' norms.

    >>> by_weight_norm([torch.tensor([[1.0], [3.0], [2.0]])], torch.tensor([[1.0, 1.0, 1.0]]), 2).tolist()
    [1, 2]
    """
    norms = [weight.double().norm(dim=1) for weight in inputs]
    scores = torch.stack([*norms, down.double().norm(dim=0)]).prod(dim=0)
    return torch.topk(scores, width).indices.sort().values
