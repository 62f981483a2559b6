"""Running sums over calibration tokens: float32 products per chunk, float64 accumulation across chunks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compression.core.linalg import add_gram_, mirror_
from compression.core.parallel import WHOLE, Group, Share, sum_of_counts
from compression.core.timeline import span
from preflight.families import Dimensions, Family


class RunningGram:
    """`Σ xᵀx` per group of channels, not centred: `[groups, width, width]` in float64, kept as its upper triangle."""

    def __init__(self, groups: int, width: int) -> None:
        """Start at zero."""
        self.groups, self.width, self.tokens = groups, width, 0
        self._sum = torch.zeros(groups, width, width, dtype=torch.float64)
        self._total = torch.zeros(groups, width, dtype=torch.float64)

    def sum_(self, group: Group) -> None:
        """Become the sum over the ranks."""
        self.tokens = sum_of_counts(group, self.tokens)
        group.sum_(self._sum)
        group.sum_(self._total)

    def add(self, x: Tensor) -> None:
        """Add activations `[..., groups * width]`."""
        with span("statistics"):
            self._add(x)

    def _add(self, x: Tensor) -> None:
        rows = x.float().reshape(-1, self.groups, self.width)
        self.tokens += rows.shape[0]
        self._total += rows.sum(dim=0, dtype=torch.float64)
        with torch.autocast(x.device.type, enabled=False):  # this is called amid forward passes
            if self.groups == 1:
                add_gram_(self._sum[0], rows[:, 0])
            else:
                self._sum += torch.einsum("tgi,tgj->gij", rows, rows)

    def mean(self) -> Tensor:
        """The correlation `E[x xᵀ]` per group, exactly symmetric."""
        mean = self._sum / max(1, self.tokens)
        for group in mean:
            mirror_(group)
        return mean

    def take_mean(self) -> Tensor:
        """`mean`, made in place of the sums, which are gone afterwards: a wide MLP's take a gigabyte."""
        mean, self._sum = self._sum, self._sum.new_zeros(0)
        mean /= max(1, self.tokens)
        for group in mean:
            mirror_(group)
        return mean

    def covariance(self) -> Tensor:
        """The correlation around the mean `E[(x − μ)(x − μ)ᵀ]` per group."""
        centre = self._total / max(1, self.tokens)
        return self.mean() - centre[:, :, None] * centre[:, None, :]

    def energy(self) -> Tensor:
        """`E[x²]` per channel, `[groups, width]`."""
        return self.mean().diagonal(dim1=1, dim2=2)


class RunningEnergy:
    """`E[x²]` per channel, `[groups, width]` in float64."""

    def __init__(self, groups: int, width: int) -> None:
        """Start at zero."""
        self.groups, self.width, self.tokens = groups, width, 0
        self._sum = torch.zeros(groups, width, dtype=torch.float64)

    def sum_(self, group: Group) -> None:
        """Become the sum over the ranks."""
        self.tokens = sum_of_counts(group, self.tokens)
        group.sum_(self._sum)

    def add(self, x: Tensor) -> None:
        """Add activations `[..., groups * width]`."""
        rows = x.float().reshape(-1, self.groups, self.width)
        self.tokens += rows.shape[0]
        self._sum += rows.square().sum(dim=0, dtype=torch.float64)

    def energy(self) -> Tensor:
        """Mean energy per channel."""
        return self._sum / max(1, self.tokens)


class RunningInfluence:
    """Block influence `1 − E[cos(x_in, x_out)]` over tokens (ShortGPT, arXiv 2403.03853; MoDeGPT's s)."""

    def __init__(self) -> None:
        """Start at zero."""
        self._sum, self._tokens = 0.0, 0

    def sum_(self, group: Group) -> None:
        """Become the sum over the ranks."""
        sums = torch.tensor([self._sum, self._tokens], dtype=torch.float64)
        group.sum_(sums)
        self._sum, self._tokens = float(sums[0]), int(sums[1])

    def add(self, block_input: Tensor, block_output: Tensor) -> None:
        """Add hidden states before and after the block, `[..., hidden]`."""
        cosine = torch.nn.functional.cosine_similarity(block_input, block_output, dim=-1)
        self._sum += float(cosine.sum(dtype=torch.float64))
        self._tokens += cosine.numel()

    def value(self) -> float:
        """In [0, 2]; larger is more important."""
        return 1.0 - self._sum / max(1, self._tokens)


def relative_distance(one: Tensor, other: Tensor, group: Group) -> float:
    """‖one − other‖ / ‖other‖ over the windows `[windows, tokens, hidden]` of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in zip(one, other, strict=True):  # window by window: no third copy of the streams
        sums += torch.stack([(x - y).square().sum(dtype=torch.float64), y.square().sum(dtype=torch.float64)])
    group.sum_(sums)
    return float(sums[0] / sums[1].clamp_min(1e-300)) ** 0.5


class BlockStatistics:
    """Everything one block's activations say, taken in one forward pass per chunk."""

    def __init__(
        self, family: Family, size: Dimensions, share: Share = WHOLE, *, gram: bool = True, mixed: bool = False
    ) -> None:
        """Start at zero.

        Args:
            family: names of the parts.
            size: the original model's sizes.
            share: which part of the calibration windows this process will show it.
            gram: False leaves out the correlations, which a profile does not need: energies of query and key remain.
            mixed: True adds the correlation of o_proj's input.
        """
        self.family, self.size, self.share, self.gram = family, size, share, gram
        running = RunningGram if gram and size.unrotated_channels else RunningEnergy
        self.query: RunningGram | RunningEnergy = running(size.heads, size.head_dim)
        self.key: RunningGram | RunningEnergy = running(size.kv_heads, size.head_dim)
        self.influence = RunningInfluence()
        self.mixed = RunningGram(size.heads, size.head_dim) if mixed else None
        if gram:
            self.value = RunningGram(size.kv_heads, size.head_dim)
            self.experts = tuple(RunningGram(1, size.mlp_width) for _ in range(size.experts))
            self.mlp = self.experts[0]  # the only one, where there is no router

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Take part in every forward pass of an original block while the context lasts.

        When it ends, the sums are those over all ranks: it may be entered once.
        """
        names = self.family.attention
        handles = [
            block.get_submodule(names.query).register_forward_hook(lambda _m, _i, out: self.query.add(out.detach())),
            block.get_submodule(names.key).register_forward_hook(lambda _m, _i, out: self.key.add(out.detach())),
        ]
        if self.gram:
            value = block.get_submodule(names.value)
            handles.append(value.register_forward_hook(lambda _m, _i, out: self.value.add(out.detach())))
            for mlp, gram in zip(self.family.mlps(self.size), self.experts, strict=True):
                down = block.get_submodule(mlp.down)
                handles.append(down.register_forward_pre_hook(lambda _m, inputs, g=gram: g.add(inputs[0].detach())))
        if (mixed := self.mixed) is not None:
            output = block.get_submodule(names.output)
            handles.append(output.register_forward_pre_hook(lambda _m, inputs: mixed.add(inputs[0].detach())))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        grams = (self.value, *self.experts) if self.gram else ()
        mixed_too = () if self.mixed is None else (self.mixed,)
        for running in (self.query, self.key, self.influence, *grams, *mixed_too):
            running.sum_(self.share.group)

    def mixed_by_group(self) -> Tensor:
        """Correlation of o_proj's input, averaged over the query heads of a group: `[kv_heads, d_h, d_h]`.

        What attention has mixed is what the output sees; v_proj's own output (type III's G) has more high frequencies.
        """
        assert self.mixed is not None  # noqa: S101 (the caller asked for it)
        size = self.size
        return self.mixed.mean().reshape(size.kv_heads, size.group, size.head_dim, size.head_dim).mean(dim=1)

    def pair_scores(self) -> Tensor:
        """MoDeGPT's scores of rotary pairs per key/value head, `[kv_heads, rotary width / 2]`.

        `√(E_k(p) Σ_heads E_q(p))`: a pair's energy is that of its two channels, j and j + width/2, and does not
        change under the rotation, so query and key are read before it.
        """
        size, width = self.size, self.size.rotary_width
        query = self.query.energy()[:, :width].reshape(size.kv_heads, size.group, 2, width // 2).sum(dim=(1, 2))
        key = self.key.energy()[:, :width].reshape(size.kv_heads, 2, width // 2).sum(dim=1)
        return (query * key).sqrt()

    def unrotated_covariances(self, start: int) -> tuple[Tensor, Tensor]:
        """Covariances of the query and key channels from `start` on, per key/value head: `[kv_heads, n, n]` each.

        A group's queries are added up, not centred: `Σ_heads E[q qᵀ]`. Keys are centred, because what is the same for
        every key moves all logits of a query alike, which the softmax does not see.
        """
        assert isinstance(self.query, RunningGram)  # noqa: S101 (the caller has channels that are not rotated)
        assert isinstance(self.key, RunningGram)  # noqa: S101
        size = self.size
        query = self.query.mean().reshape(size.kv_heads, size.group, size.head_dim, size.head_dim).sum(dim=1)
        return query[:, start:, start:], self.key.covariance()[:, start:, start:]
