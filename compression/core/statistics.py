"""Running sums over calibration tokens: float32 products per chunk, float64 accumulation across chunks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from preflight.families import Family
from preflight.families.spec import Dimensions


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


class BlockStatistics:
    """Everything one block's activations say, taken in one forward pass per chunk."""

    def __init__(self, family: Family, size: Dimensions, *, gram: bool = True) -> None:
        """Start at zero.

        Args:
            family: names of the parts.
            size: the original model's sizes.
            gram: False leaves out the MLP and value correlations, which a profile does not need.
        """
        self.family, self.size, self.gram = family, size, gram
        self.query = RunningEnergy(size.heads, size.head_dim)
        self.key = RunningEnergy(size.kv_heads, size.head_dim)
        self.influence = RunningInfluence()
        if gram:
            self.value = RunningGram(size.kv_heads, size.head_dim)
            self.mlp = RunningGram(1, size.mlp_width)

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Take part in every forward pass of an original block while the context lasts."""
        names = self.family.attention
        handles = [
            block.get_submodule(names.query).register_forward_hook(lambda _m, _i, out: self.query.add(out)),
            block.get_submodule(names.key).register_forward_hook(lambda _m, _i, out: self.key.add(out)),
        ]
        if self.gram:
            value, down = block.get_submodule(names.value), block.get_submodule(self.family.mlp.down)
            handles.append(value.register_forward_hook(lambda _m, _i, out: self.value.add(out)))
            handles.append(down.register_forward_pre_hook(lambda _m, inputs: self.mlp.add(inputs[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pair_scores(self) -> Tensor:
        """MoDeGPT's scores of rotary pairs per key/value head, `[kv_heads, head_dim / 2]`.

        `√(E_k(p) Σ_heads E_q(p))`: a pair's energy is that of its two channels, j and j + head_dim/2, and does not
        change under the rotation, so query and key are read before it.
        """
        half = self.size.head_dim // 2
        query = self.query.mean().reshape(self.size.kv_heads, self.size.group, 2, half).sum(dim=(1, 2))
        key = self.key.mean().reshape(self.size.kv_heads, 2, half).sum(dim=1)
        return (query * key).sqrt()
