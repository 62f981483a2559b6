"""What the algorithms are handed from outside: a sink for progress and a store for finished blocks."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from api_schemas.events import ProgressEvent
from api_schemas.plans import BlockShape
from api_schemas.reports import BlockReport, ModuleReport
from compression.core.statistics import BlockStatistics
from preflight.families import Dimensions, Family


class Cancelled(Exception):
    """Raised by a sink, between blocks only, when the job was asked to stop."""


class ProgressSink(Protocol):
    """Where a running compression says how far it is."""

    def emit(self, event: ProgressEvent) -> None:
        """Take one event; may raise `Cancelled`."""


class NullSink:
    """A sink that nobody listens to."""

    def emit(self, event: ProgressEvent) -> None:
        """Drop the event."""


@dataclass(frozen=True)
class BlockResult:
    """A finished block: its tensors in storage dtype, named relative to the block, and its report."""

    index: int
    state: dict[str, Tensor]
    report: BlockReport


class BlockStore(Protocol):
    """Durable results by block index: whole or absent."""

    def get(self, index: int) -> BlockResult | None:
        """The finished block, or None."""

    def put(self, result: BlockResult) -> None:
        """Keep a finished block; it survives a kill once this returns."""


@dataclass(frozen=True)
class Solution:
    """What a method makes of one block: its tensors in storage dtype, and what each part lost."""

    state: dict[str, Tensor]
    modules: tuple[ModuleReport, ...]


@dataclass(frozen=True)
class Step:
    """A block that a walk has just solved and passed.

    Attributes:
        solution: its tensors and what each part lost.
        block_influence: `1 − E[cos(x_in, x_out)]` of the original block, on all tokens or on the first chunk's.
        relative_output_error: ‖ŷ − y‖/‖y − x‖ of narrowed and original block on the same inputs x.
        stream_error: ‖compressed − original‖/‖original‖ of the hidden states after it, where both streams are walked.
    """

    solution: Solution
    block_influence: float
    relative_output_error: float
    stream_error: float | None


class Streamed(Protocol):
    """A model that is run block by block: from a folder, or from finished blocks that are not yet written."""

    @property
    def family(self) -> Family:
        """Its table."""

    @property
    def size(self) -> Dimensions:
        """Its sizes; widths per block are not in it."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The canonical tensors of one block in storage dtype, named relative to it."""

    def block(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The block at `index` with these weights, in float32."""

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """Run one block on `[windows, tokens, hidden]`."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[windows, tokens]` to hidden states `[windows, tokens, hidden]`."""

    def head(self) -> AbstractContextManager[nn.Sequential]:
        """Final norm and head: hidden states to logits."""


class Walker(Protocol):
    """Hidden states on their way through the blocks."""

    def solve_(self, index: int, state: dict[str, Tensor]) -> Step:
        """Solve the block with these original tensors and move the hidden states past it."""

    def replay_(self, index: int, result: BlockResult) -> None:
        """Move the hidden states past a block that was finished before."""


class Method(Protocol):
    """A paper, as the blockwise walk calls it."""

    stage: ClassVar[str]
    shapes: Sequence[BlockShape]

    def scaling(self, index: int) -> float:
        """Scale of the attention logits that the narrowed block expects."""

    def solve(self, index: int, state: dict[str, Tensor], statistics: BlockStatistics) -> Solution:
        """Narrow one block's tensors to the planned shape."""
