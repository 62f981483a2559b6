"""Running sums over calibration tokens: float32 products per chunk, float64 accumulation across chunks."""

import torch
from torch import Tensor


class RunningGram:
    """`Σ xᵀx` per group of channels, not centred; `[groups, width, width]` in float64."""

    def __init__(self, groups: int, width: int) -> None:
        """Start at zero."""
        self.groups, self.width, self.tokens = groups, width, 0
        self._sum = torch.zeros(groups, width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add activations `[..., groups * width]`."""
        rows = x.reshape(-1, self.groups, self.width)
        self.tokens += rows.shape[0]
        if self.groups == 1:
            flat = rows[:, 0]
            self._sum[0] += flat.T @ flat
        else:
            self._sum += torch.einsum("tgi,tgj->gij", rows, rows)

    def mean(self) -> Tensor:
        """The correlation `E[x xᵀ]` per group, exactly symmetric."""
        mean = self._sum / max(1, self.tokens)
        return (mean + mean.mT) / 2


class RunningEnergy:
    """`E[x²]` per channel, `[groups, width]` in float64."""

    def __init__(self, groups: int, width: int) -> None:
        """Start at zero."""
        self.groups, self.width, self.tokens = groups, width, 0
        self._sum = torch.zeros(groups, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add activations `[..., groups * width]`."""
        rows = x.reshape(-1, self.groups, self.width)
        self.tokens += rows.shape[0]
        self._sum += rows.square().sum(dim=0, dtype=torch.float64)

    def mean(self) -> Tensor:
        """Mean energy per channel."""
        return self._sum / max(1, self.tokens)


class RunningInfluence:
    """Block influence `1 − E[cos(x_in, x_out)]` over tokens (ShortGPT, arXiv 2403.03853; MoDeGPT's s)."""

    def __init__(self) -> None:
        """Start at zero."""
        self._sum, self._tokens = 0.0, 0

    def add(self, block_input: Tensor, block_output: Tensor) -> None:
        """Add hidden states before and after the block, `[..., hidden]`."""
        cosine = torch.nn.functional.cosine_similarity(block_input, block_output, dim=-1)
        self._sum += float(cosine.sum(dtype=torch.float64))
        self._tokens += cosine.numel()

    def value(self) -> float:
        """In [0, 2]; larger is more important."""
        return 1.0 - self._sum / max(1, self._tokens)
