"""Splitting a sparsity over blocks: MoDeGPT's entropy-regularised allocation with an exact cap.

Maximises `Σ s_l (1 − φ_l) + ε Σ H(φ_l)` subject to `mean(φ) = φ_avg` and `φ_l ≤ cap` (MoDeGPT eq. 10–11; the cap is
ours: the published softmax alone can exceed 1). Solved by repeating the softmax over the blocks that are not capped.
"""

import math
from collections.abc import Sequence


def allocate(block_influence: Sequence[float], sparsity: float, temperature: float, cap: float) -> tuple[float, ...]:
    """Return the sparsity of each block; their mean equals `sparsity`.

    Args:
        block_influence: one value per block; larger is more important and gets less sparsity.
        sparsity: wanted mean, at most `cap`.
        temperature: in units of the mean block influence, so that it carries over between models.
        cap: no block loses more.
    """
    count = len(block_influence)
    scale = temperature * max(sum(block_influence) / count, 1e-12)
    capped: set[int] = set()
    while True:
        free = [index for index in range(count) if index not in capped]
        budget = count * sparsity - len(capped) * cap
        lowest = min((block_influence[index] for index in free), default=0.0)
        weights = {index: math.exp((lowest - block_influence[index]) / scale) for index in free}
        total = sum(weights.values())
        shares = {index: budget * weight / total for index, weight in weights.items()}
        over = {index for index, share in shares.items() if share > cap}
        if not over:
            return tuple(cap if index in capped else shares[index] for index in range(count))
        capped |= over
