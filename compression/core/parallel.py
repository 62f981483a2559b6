"""Several processes (ranks) that share one calibration: who has which part, and sums over all in one fixed order.

Second moments are sums over tokens, so each rank adds up its own share and the sums are added in rank order, in
float64: the result is that of one process up to float64 rounding, and the same bits on every rank and every run. All
ranks solve alike; `agree` sees that they do. Every method here but the properties is called by all ranks in the same
order. Errors are named (`rank_lost`, `ranks_disagree`) and no wait is longer than the timeout.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # documented there

from api_schemas.errors import InvalidRequest, JobFailed

PIECE = 1 << 20  # numbers sent at once: while one is added further on, the next is under way
FAILED = "modepress/failed"  # where a failing rank leaves its reason for the others


class Group(Protocol):
    """The processes that work on one compression."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> None:
        """Replace a float64 tensor by its sum over the ranks, added in rank order: the same bits on all of them."""

    def broadcast(self, content: bytes | None) -> bytes | None:
        """Rank 0's content; what the others pass is not looked at."""

    def agree(self, content: bytes, what: str) -> None:
        """See that every rank has the same bytes.

        Raises:
            JobFailed: `ranks_disagree`, naming `what`.
        """


class Alone:
    """One process: nothing to sum, nobody to ask."""

    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> None:
        """It is the sum."""

    def broadcast(self, content: bytes | None) -> bytes | None:
        """It is the content."""
        return content

    def agree(self, content: bytes, what: str) -> None:
        """One always agrees with oneself."""


class Ranks:
    """The processes of a `torchrun`, over gloo; `joined` makes it."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Take part as `rank` of `size`; the process group exists already."""
        self._store, self._rank, self._size = store, rank, size

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self._size

    def sum_(self, tensor: Tensor) -> None:
        """Along the chain of ranks each adds its own to what came before; the last one tells all."""
        if tensor.dtype != torch.float64:
            raise TypeError(f"sums over ranks are in float64, not {tensor.dtype}")
        total = tensor.detach().to("cpu", copy=True).reshape(-1)  # gloo speaks of host memory
        before, after = self._rank - 1, self._rank + 1
        for piece in total.split(PIECE):
            if before >= 0:
                with self._waiting_for(before):
                    received = torch.empty_like(piece)
                    dist.recv(received, before)
                torch.add(received, piece, out=piece)
            if after < self._size:
                with self._waiting_for(after):
                    dist.send(piece, after)
        with self._waiting_for(self._size - 1):
            dist.broadcast(total, self._size - 1)
        tensor.copy_(total.reshape(tensor.shape))

    def broadcast(self, content: bytes | None) -> bytes | None:
        """Rank 0's content: its length (−1 for None), then its bytes."""
        length = torch.tensor([-1 if content is None else len(content)], device="cpu")
        with self._waiting_for(0):
            dist.broadcast(length, 0)
            if int(length) <= 0:
                return None if int(length) < 0 else b""
            own = bytearray(content if self._rank == 0 and content is not None else int(length))
            dist.broadcast(torch.frombuffer(own, dtype=torch.uint8), 0)
        return bytes(own)

    def agree(self, content: bytes, what: str) -> None:
        """Compare digests with rank 0's."""
        own = hashlib.sha256(content).digest()
        if self.broadcast(own) != own:
            raise JobFailed(
                "ranks_disagree",
                f"{what} is not the same on rank {self._rank} as on rank 0; give all ranks the same model, text, "
                "packages, processor type and number of threads",
            )

    @contextmanager
    def _waiting_for(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            whom = f"rank {other}" if other != self._rank else "the others"
            raise self.lost(f"lost {whom}: {str(error).splitlines()[0]}") from error

    def lost(self, event: str) -> JobFailed:
        """The error of a rank that cannot go on without the others, with the reason one of them has left, if any."""
        try:
            left = self._store.get(FAILED).decode() if self._store.check([FAILED]) else "it left no reason"
        except RuntimeError:
            left = "the meeting place is gone too"
        return JobFailed("rank_lost", f"rank {self._rank} of {self._size} {event} ({left}); start all ranks again")


@contextmanager
def joined(timeout_s: float) -> Iterator[Group]:
    """The group that `torchrun` describes in the environment; without it, one process alone.

    Args:
        timeout_s: seconds that one rank waits for another before it ends with `rank_lost`.

    Raises:
        InvalidRequest: `ranks_unset` when the environment speaks of several ranks but does not say where they meet.
        JobFailed: `rank_lost` when another rank ended, was not there in time, or this one was told to stop.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Alone()
        return
    store, rank, size = _meet(timedelta(seconds=timeout_s))
    group = Ranks(store, rank, size)

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise group.lost("was told to stop, as torchrun does when another rank has ended")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield group
        dist.destroy_process_group()
    except BaseException as error:
        if getattr(error, "code", None) != "rank_lost":  # the first to fail says why; the others repeat it
            store.set(FAILED, f"rank {rank} said: {error}")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _meet(timeout: timedelta) -> tuple[Store, int, int]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    try:
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        address = os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise InvalidRequest(
            "ranks_unset",
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but of {', '.join(names)} one is not set or not a number "
            f"({error}); start with torchrun, or unset WORLD_SIZE",
            "WORLD_SIZE",
        ) from error
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself does
    try:
        store = TCPStore(address, port, size, is_master=hosts, timeout=timeout, wait_for_workers=False)
        meeting = PrefixStore("modepress/gloo", store)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise JobFailed("rank_lost", f"rank {rank} of {size} did not meet the others: {reason}") from error
    return store, rank, size


@dataclass(frozen=True)
class Share:
    """One rank's part of the windows: whole chunks, in order, so that every chunk is the same as in one process.

    Attributes:
        group: who the others are.
        windows: of the whole text.
        first_chunk: the number, in the whole text, of the chunk it starts with.
    """

    group: Group
    windows: slice
    first_chunk: int

    @property
    def leads(self) -> bool:
        """Whether this rank has the first windows, writes the files and tells of progress."""
        return self.group.rank == 0


WHOLE = Share(Alone(), slice(None), 0)


def share_of(group: Group, windows: int, windows_per_chunk: int) -> Share:
    """This rank's share of so many windows; of later ranks it is empty where there are more ranks than chunks."""
    count = -(-windows // windows_per_chunk)
    first, last = (-(-count * rank // group.size) for rank in (group.rank, group.rank + 1))
    return Share(group, slice(first * windows_per_chunk, min(last * windows_per_chunk, windows)), first)


def sum_of_counts(group: Group, count: int) -> int:
    """A count over all ranks; exact up to 2^53."""
    total = torch.tensor(float(count), dtype=torch.float64)
    group.sum_(total)
    return int(total)
