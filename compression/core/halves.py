"""The two halves of a decoder block, run apart: attention up to where the MLP reads, and the MLP from there.

    sequential   h = x + s·a(n(x))                  y = h + s·m(n'(h))
    parallel     y = x + s·a(n(x)) + s·m(n'(x))     (the MLP reads x itself)

Nothing is rebuilt from its parts. The block itself runs, with silence in place of what is not wanted, so that norms,
scales, routers and shapes stay those of the stock code. Which form a block has, its family's table says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.core.streamed_model import StreamedModel
from compression.core.taps import inputs_of, run_until, silenced


class _SilentAttention(nn.Module):
    """Attention that adds nothing to the stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


@dataclass(frozen=True)
class Routed:
    """The tokens that one MLP sees: all of them, or those that a router sends to one expert.

    Attributes:
        rows: `[n]` places among all tokens of the run, or all of them as a slice.
        weight: `[n, 1]` factor of its output in the sum over experts.
        share: `[n, 1]` its part of a correction of that sum, in its own output: Σ weight · share = 1 at every token,
            of all such parts the smallest.
    """

    rows: Tensor | slice
    weight: Tensor
    share: Tensor


@dataclass(frozen=True)
class Heard:
    """A run whose output linears were silent.

    Attributes:
        rest: `[windows, tokens, hidden]` the stream without what they would have said.
        inputs: what each was told, by name; an expert without tokens is absent.
        chosen: `[tokens, k]` experts of each token and `weights` of their outputs; None without a router.
    """

    rest: Tensor
    inputs: dict[str, Tensor]
    chosen: Tensor | None = None
    weights: Tensor | None = None

    def routed(self, expert: int) -> Routed:
        """The tokens of one expert in the order in which its linears see them."""
        if self.chosen is None or self.weights is None:
            one = torch.ones(1, 1, dtype=self.rest.dtype, device=self.rest.device)
            return Routed(slice(None), one, one)
        rows, place = torch.where(self.chosen == expert)
        weight = self.weights[rows, place, None]
        return Routed(rows, weight, weight / self.weights[rows].square().sum(dim=-1, keepdim=True))


class Halves:
    """Runs the halves of any block of one model."""

    def __init__(self, model: StreamedModel) -> None:
        """Read the form of its blocks from the family's table."""
        self.model, self.family = model, model.family
        settings = model.config.to_dict()
        self.parallel = self.family.is_parallel(settings)
        self.scale = self.family.factor(settings, self.family.residual_scale)
        self._downs = tuple(mlp.down for mlp in self.family.mlps(model.size))

    def half_way(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """The stream that the MLP's norm reads when the block gets `hidden [windows, tokens, hidden]`."""
        if self.parallel:
            return hidden
        return run_until(self.model, block, hidden, index, self.family.mlp_norm).view_as(hidden)  # OPT's are rows

    def mlp_inputs(self, block: nn.Module, middle: Tensor, index: int) -> Tensor:
        """What the MLP is given when its norm reads `middle`."""
        with self._without_attention(block):
            return run_until(self.model, block, middle, index, self.family.mlp_entry)

    def finish(self, block: nn.Module, middle: Tensor, index: int) -> Tensor:
        """The stream after the block from where the MLP reads it."""
        if self.parallel:
            return self.model.forward(block, middle, index)
        with self._without_attention(block):
            return self.model.forward(block, middle, index)

    def without_attention_output(self, block: nn.Module, hidden: Tensor, index: int) -> Heard:
        """Run with a silent attention output; `rest` is the stream where its effect is judged.

        That is half way in a sequential block, and the end of a parallel one, whose MLP counts as said already.
        """
        with _silent(block, (self.family.attention.output,)) as heard:
            rest = self.model.forward(block, hidden, index) if self.parallel else self.half_way(block, hidden, index)
        return Heard(rest, heard)

    def without_mlp_output(self, block: nn.Module, middle: Tensor, index: int) -> Heard:
        """Run from where the MLP reads to the end with silent down projections."""
        experts = self.family.experts
        if experts is None:
            with _silent(block, self._downs) as heard:
                return Heard(self.finish(block, middle, index), heard)
        told: list[Tensor] = []

        def listen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            told.extend(inputs[1:])

        handle = block.get_submodule(experts.module).register_forward_pre_hook(listen)
        try:
            with _silent(block, self._downs) as heard:
                rest = self.finish(block, middle, index)
        finally:
            handle.remove()
        return Heard(rest, heard, *told)

    @contextmanager
    def _without_attention(self, block: nn.Module) -> Iterator[None]:
        name = self.family.attention.module
        attention = block.get_submodule(name)
        block.set_submodule(name, _SilentAttention())
        try:
            yield
        finally:
            block.set_submodule(name, attention)


@contextmanager
def _silent(block: nn.Module, linears: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Linears that say nothing, and what each is told, by name."""
    with inputs_of(block, {name: name for name in linears}) as heard, silenced(block, linears):
        yield heard
