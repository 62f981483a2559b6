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


def removal_order(C: Tensor, D: Tensor, metric: Tensor | None, multiple: int = 1) -> Removal:
    """Order the units of an MLP by what they would take with them.

    Args:
        C: `[m, m]` float64 correlation of the units.
        D: `[d, m]` float64 down projection.
        metric: `[d, d]` float64, symmetric positive semi-definite, on the outputs; None is the identity.
        multiple: batches are multiples of this, so that the priced widths are widths that will be asked for.
    """
    count = len(C)
    batch = max(multiple, multiple * round(count / BATCHES / multiple))
    floor = FLOOR * C.diagonal().mean()
    inverse = torch.cholesky_inverse(
        factorize(C + floor * torch.eye(count, dtype=C.dtype, device=C.device), "MLP correlation").lower
    )
    W = D if metric is None else symmetric_factor(metric).T @ D
    alive, removed = torch.arange(count, device=C.device), []
    widths, losses = [count], [0.0]
    while len(alive) > batch:
        saliency = W.square().sum(dim=0) / inverse.diagonal()
        going = torch.topk(saliency, batch, largest=False).indices
        pulled = torch.linalg.solve(inverse[going][:, going], inverse[going])  # (C⁻¹_qq)⁻¹ C⁻¹_q:
        price = torch.sum((W[:, going] @ torch.linalg.inv(inverse[going][:, going])) * W[:, going])
        W = W - W[:, going] @ pulled
        inverse = inverse - inverse[:, going] @ pulled
        staying = torch.ones_like(alive, dtype=torch.bool)
        staying[going] = False
        removed.append(alive[going])
        alive, W, inverse = alive[staying], W[:, staying], inverse[staying][:, staying]
        widths.append(len(alive))
        losses.append(losses[-1] + max(0.0, float(price)))
    return Removal(torch.cat((*removed, alive)), tuple(widths), tuple(losses))


def symmetric_factor(metric: Tensor) -> Tensor:
    """A factor R with `R Rᵀ = metric`, `[d, d]`, for a positive semi-definite metric."""
    energy, basis = torch.linalg.eigh(metric)
    return basis * energy.clamp_min(0).sqrt()
