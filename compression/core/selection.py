"""Which MLP units can go, judged by what the output loses once the others have taken over.

Removing a set q of units and re-fitting the rest exactly costs `tr(F W_q (C⁻¹_qq)⁻¹ W_qᵀ)` (optimal brain surgeon,
Hassibi & Stork 1993, for a set instead of one weight), where W is the current down projection, C⁻¹ the inverse
correlation of the units still there and F a metric on the outputs. Units leave in batches; after each batch W and C⁻¹
are updated exactly, so that the order knows of every removal before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.core.linalg import factorize

BATCHES = 24
FLOOR = 1e-6  # of the mean diagonal, added to C: a unit that never fires must have a finite inverse


@dataclass(frozen=True)
class Removal:
    """An order of removal with its price.

    Attributes:
        order: `[m]` units, first to go first.
        widths: units left after each batch, descending from m.
        losses: output error in the metric at each of these widths, ascending from 0.
    """

    order: Tensor
    widths: tuple[int, ...]
    losses: tuple[float, ...]

    def keep(self, width: int) -> Tensor:
        """The `width` units that leave last, ascending."""
        return self.order[len(self.order) - width :].sort().values


def removal_order(C: Tensor, D: Tensor, metric: Tensor | None, multiple: int = 1, until: int = 0) -> Removal:
    """Order the units of an MLP by what they would take with them.

    Args:
        C: `[m, m]` float64 correlation of the units.
        D: `[d, m]` float64 down projection.
        metric: `[d, d]` float64, symmetric positive semi-definite, on the outputs; None is the identity.
        multiple: batches are multiples of this, so that the priced widths are widths that will be asked for.
        until: the smallest width that will be asked for; the units left there come in no order.
    """
    count = len(C)
    batch = max(multiple, multiple * round(count / BATCHES / multiple))
    inverse = torch.cholesky_inverse(factorize(C, "MLP correlation", float(FLOOR * C.diagonal().mean())).lower)
    W = D.clone() if metric is None else symmetric_factor(metric).T @ D
    alive, removed = torch.arange(count, device=C.device), []
    widths, losses = [count], [0.0]
    while len(alive) > max(batch, until):
        going = torch.topk(W.square().sum(dim=0) / inverse.diagonal(), batch, largest=False).indices
        rows = inverse[going]
        pulled = torch.linalg.solve(rows[:, going], rows)  # (C⁻¹_qq)⁻¹ C⁻¹_q:
        price = torch.sum((W[:, going] @ torch.linalg.inv(rows[:, going])) * W[:, going])
        W.addmm_(W[:, going], pulled, alpha=-1)
        inverse.addmm_(rows.T, pulled, alpha=-1)
        removed.append(alive[going])
        staying = _without(going, len(alive))
        alive, W, inverse = alive[staying], W[:, staying], inverse[staying[:, None], staying]
        widths.append(len(alive))
        losses.append(losses[-1] + max(0.0, float(price)))
    return Removal(torch.cat((*removed, alive)), tuple(widths), tuple(losses))


def _without(going: Tensor, count: int) -> Tensor:
    staying = torch.ones(count, dtype=torch.bool, device=going.device)
    staying[going] = False
    return staying.nonzero().flatten()


def symmetric_factor(metric: Tensor) -> Tensor:
    """A factor R with `R Rᵀ = metric`, `[d, d]`, for a positive semi-definite metric."""
    energy, basis = torch.linalg.eigh(metric)
    return basis * energy.clamp_min(0).sqrt()
