"""The one walk over the decoder blocks, for all methods and all families.

One block is in memory at a time, in float32; the hidden states of the calibration set are the only thing that grows
with the amount of text. Whether a block was solved now or in an earlier attempt makes no difference to what follows.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from api_schemas.reports import BlockReport, CountBeforeAfter, Rerun
from compression.core.packed_forms import count_bytes, count_parameters
from compression.core.parallel import WHOLE, Group, Share, share_of
from compression.core.protocols import BlockResult, BlockStore, Method, Step, Streamed, Walker
from compression.core.rerun import Careful
from compression.core.statistics import BlockStatistics
from compression.core.streamed_model import StreamedModel
from compression.core.taps import silenced
from compression.core.timeline import span
from preflight.families import Dimensions

CHUNK_TOKENS = 2048  # tokens per forward pass: enough to keep the matrix units busy, little enough to stay in cache
ROWS_SHARE = 8  # of these tokens, one in so many has its logits held at once
_chunk_tokens: ContextVar[int] = ContextVar("chunk_tokens", default=CHUNK_TOKENS)


@contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    """Run about so many tokens at once inside, as a job does that ran out of memory with `CHUNK_TOKENS`."""
    token = _chunk_tokens.set(tokens)
    try:
        yield
    finally:
        _chunk_tokens.reset(token)


def chunk_tokens() -> int:
    """About how many tokens are run at once."""
    return _chunk_tokens.get()


def head_rows() -> int:
    """Positions whose logits are held at once: rows x vocabulary x 4 bytes, for each model."""
    return max(1, chunk_tokens() // ROWS_SHARE)


def chunks(hidden: Tensor) -> Iterator[slice]:
    """Slices over windows `[windows, tokens, hidden]` of about `chunk_tokens()` tokens each."""
    step = windows_per_chunk(hidden.shape[1])
    for start in range(0, hidden.shape[0], step):
        yield slice(start, start + step)


def windows_per_chunk(length: int) -> int:
    """How many windows of so many tokens are run at once."""
    return max(1, chunk_tokens() // length)


def share_of_windows(group: Group, tokens: Tensor) -> Share:
    """This rank's share of `[windows, tokens]`."""
    return share_of(group, tokens.shape[0], windows_per_chunk(tokens.shape[1]))


def run_block_(model: Streamed, block: nn.Module, index: int, hidden: Tensor) -> None:
    """Replace hidden states by the block's outputs, in place."""
    for part in chunks(hidden):
        hidden[part] = model.forward(block, hidden[part], index)


@torch.inference_mode()
def profile(
    model: StreamedModel, size: Dimensions, hidden: Tensor, done: Callable[[int], None], share: Share = WHOLE
) -> list[BlockStatistics]:
    """Walk the original model once for what a global plan needs: block influence and rotary-pair scores.

    Args:
        model: the original.
        size: its sizes.
        hidden: `[windows, tokens, hidden]` inputs of block 0; overwritten.
        done: called with each finished block's index.
        share: which part of all windows `hidden` is.
    """
    profiles = []
    for index in range(model.blocks):
        block = model.block(index, model.block_state(index))
        statistics = BlockStatistics(model.family, size, share, gram=False)
        with statistics.watching(block):
            for part in chunks(hidden):
                output = model.forward(block, hidden[part], index)
                statistics.influence.add(hidden[part], output)
                hidden[part] = output
        profiles.append(statistics)
        done(index)
    return profiles


@torch.inference_mode()
def compress_blocks(
    model: Streamed,
    walker: Walker,
    store: BlockStore,
    step: int = 0,
    *,
    again: Callable[[], Walker] | None = None,
) -> Iterator[BlockReport]:
    """Walk the decoder once: solve block i, keep it, and hand its outputs to block i + 1.

    Args:
        model: what the step starts from.
        walker: hidden states with a method.
        store: where finished blocks are kept; blocks it has are passed, not solved again.
        step: number of the recipe's step, for the report.
        again: makes a fresh walker for a block that looks wrong (see `rerun`); None solves nothing twice.
    """
    careful = Careful(walker, model.block_state, again, store)
    del walker  # whoever solves again needs its memory
    last = max((index for index in range(model.blocks) if store.get(index) is None), default=-1)
    for index in range(model.blocks):
        result = store.get(index)
        if result is None:
            with span("other", "block", block=index, step=step):
                started = time.perf_counter()
                solved, rerun = careful.solve_(index)
                result = _result(step, index, careful.state, solved, started, rerun)
                store.put(result)
        elif index < last:  # beyond it nobody needs the hidden states any more
            with span("other", "replay", block=index, step=step):
                careful.replay_(index, result)
        yield result.report


def _result(
    number: int, index: int, state: dict[str, Tensor], step: Step, started: float, rerun: Rerun | None
) -> BlockResult:
    new = step.solution.state
    before, after = count_parameters(state), count_parameters(new)
    report = BlockReport(
        step=number,
        block=index,
        block_influence=step.block_influence,
        sparsity=1 - after / before,
        parameters=CountBeforeAfter(before=before, after=after),
        bytes=CountBeforeAfter(before=count_bytes(state), after=count_bytes(new)),
        relative_output_error=step.relative_output_error,
        stream_error=step.stream_error,
        seconds=time.perf_counter() - started,
        modules=step.solution.modules,
        rerun=rerun,
    )
    return BlockResult(index, new, report)


class OneStream:
    """Hidden states of one model: a block is observed on them, solved, and replaces them by its outputs."""

    def __init__(
        self,
        model: StreamedModel,
        method: Method,
        size: Dimensions,
        hidden: Tensor,
        share: Share = WHOLE,
        *,
        propagation: str,
    ) -> None:
        """Start at the embeddings.

        Args:
            model: the original.
            method: what is done to a block.
            size: the original's sizes.
            hidden: `[windows, tokens, hidden]` inputs of block 0, taken over.
            share: which part of all windows `hidden` is; the error that a step reports is that of its first chunk.
            propagation: `sequential` calibrates block i on the outputs of the compressed blocks before it, `dense` on
                those of the original ones.
        """
        self.model, self.method, self.size, self.hidden, self.share = model, method, size, hidden, share
        self.dense = propagation == "dense"
        self._downs = tuple(mlp.down for mlp in model.family.mlps(size))

    def solve_(self, index: int, state: dict[str, Tensor]) -> Step:
        """Observe, solve and pass one block."""
        block = self.model.block(index, state)
        statistics = BlockStatistics(self.model.family, self.size, self.share)
        start, first = self._observe_(block, index, statistics)
        del block
        with span("solve"):
            solution = self.method.solve(index, state, statistics)
        narrow = self._narrow(index, solution.state)
        error = self.model.forward(narrow, start, index) - first
        if not self.dense:
            run_block_(self.model, narrow, index, self.hidden)
        lost = float(error.norm() / (first - start).norm().clamp_min(1e-30))
        return Step(solution, statistics.influence.value(), lost, None)

    def replay_(self, index: int, result: BlockResult) -> None:
        """Pass a block that an earlier attempt finished."""
        state = self.model.block_state(index) if self.dense else result.state
        block = self.model.block(index, state) if self.dense else self._narrow(index, state)
        run_block_(self.model, block, index, self.hidden)

    def _narrow(self, index: int, state: dict[str, Tensor]) -> nn.Module:
        shape = self.method.shapes[index].model_dump()
        return self.model.resized_block(index, state, shape, self.method.scaling(index))

    def _observe_(self, block: nn.Module, index: int, statistics: BlockStatistics) -> tuple[Tensor, Tensor]:
        """Run the original block over all chunks; returns the first chunk's inputs and outputs.

        Its outputs are not what the next block reads unless propagation is dense: then beyond the first chunk nobody
        asks for them, and the MLP's last product is left out.
        """
        first, *others = chunks(self.hidden)
        start = self.hidden[first].clone()
        with statistics.watching(block):
            output = self.model.forward(block, start, index)
            if self.dense or self.share.leads:
                statistics.influence.add(start, output)
            with nullcontext() if self.dense else silenced(block, self._downs):
                for part in others:
                    after = self.model.forward(block, self.hidden[part], index)
                    if self.dense:
                        statistics.influence.add(self.hidden[part], after)
                        self.hidden[part] = after
        if self.dense:
            self.hidden[first] = output
        return start, output
