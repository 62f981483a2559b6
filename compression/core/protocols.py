"""What the algorithms are handed from outside: a sink for progress and a store for finished blocks."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from api_schemas.events import ProgressEvent
from api_schemas.reports import BlockReport


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
