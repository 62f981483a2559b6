"""Models whose blocks are finished but not yet written: they stream like the folder that they will become."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compression.core.packed_forms import unpacked
from compression.core.placement import moved
from compression.core.protocols import BlockStore, Method, Streamed
from compression.core.streamed_model import StreamedModel
from preflight.families import Dimensions, Family


class _Unwritten:
    """A model with finished blocks in place of its own; everything else is its own."""

    def __init__(self, before: Streamed, store: BlockStore) -> None:
        self.before, self.store = before, store

    @property
    def family(self) -> Family:
        """The table of the model before."""
        return self.before.family

    @property
    def size(self) -> Dimensions:
        """The sizes of the original; widths per block are not in it."""
        return self.before.size

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.before.device

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return self.before.blocks

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The finished canonical tensors of one block in storage dtype."""
        result = self.store.get(index)
        if result is None:
            raise RuntimeError(f"block {index} vanished from the block store")
        return moved(result.state, self.device)

    def block(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The block at `index` with these weights, in float32."""
        return self.before.block(index, state)

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """Run one block on `[windows, tokens, hidden]`, every window from position 0."""
        return self.before.forward(block, hidden, index)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[windows, tokens]` to hidden states `[windows, tokens, hidden]` in float32."""
        return self.before.embed(tokens)

    @contextmanager
    def head(self) -> Iterator[nn.Sequential]:
        """Final norm and head in float32."""
        with self.before.head() as head:
            yield head


class NarrowedModel(_Unwritten):
    """The original with every block replaced by its narrowed one."""

    def __init__(self, original: StreamedModel, method: Method, store: BlockStore) -> None:
        """Narrow the blocks of `original` to the shapes that `method` knows, with the tensors in `store`."""
        super().__init__(original, store)
        self.original, self.method = original, method

    def block(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The narrowed block with these weights, in float32."""
        shape = self.method.shapes[index].model_dump()
        return self.original.resized_block(index, state, shape, self.method.scaling(index))


class QuantizedModel(_Unwritten):
    """A model with the linears of its blocks replaced by what their codes stand for."""

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The finished tensors of one block in storage dtype, unpacked."""
        return unpacked(super().block_state(index))
