"""The one walk over the decoder blocks, for all methods and all families.

One block is in memory at a time, in float32; the hidden states of the calibration set are the only thing that grows
with the amount of text. Whether a block was solved now or in an earlier attempt makes no difference to what follows.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from api_schemas.reports import BlockReport, CountBeforeAfter
from compression.core.protocols import BlockResult, BlockStore, Method
from compression.core.statistics import BlockStatistics
from compression.core.streamed_model import StreamedModel
from preflight.families.spec import Dimensions

CHUNK_TOKENS = 2048  # tokens per forward pass: enough to keep the matrix units busy, little enough to stay in cache


def chunks(hidden: Tensor) -> Iterator[slice]:
    """Slices over windows `[windows, tokens, hidden]` of about `CHUNK_TOKENS` tokens each."""
    step = max(1, CHUNK_TOKENS // hidden.shape[1])
    for start in range(0, hidden.shape[0], step):
        yield slice(start, start + step)


def run_block_(model: StreamedModel, block: nn.Module, index: int, hidden: Tensor) -> None:
    """Replace hidden states by the block's outputs, in place."""
    for part in chunks(hidden):
        hidden[part] = model.forward(block, hidden[part], index)


@torch.inference_mode()
def profile(
    model: StreamedModel, size: Dimensions, hidden: Tensor, done: Callable[[int], None]
) -> list[BlockStatistics]:
    """Walk the original model once for what a global plan needs: block influence and rotary-pair scores.

    Args:
        model: the original.
        size: its sizes.
        hidden: `[windows, tokens, hidden]` inputs of block 0; overwritten.
        done: called with each finished block's index.
    """
    profiles = []
    for index in range(model.blocks):
        block = model.block(index, model.block_state(index))
        statistics = BlockStatistics(model.family, size, gram=False)
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
    model: StreamedModel, method: Method, size: Dimensions, hidden: Tensor, store: BlockStore, *, propagation: str
) -> Iterator[BlockReport]:
    """Walk the decoder once: observe block i, solve it, keep it, and hand its outputs to block i + 1.

    Args:
        model: the original.
        method: what is done to a block.
        size: the original's sizes.
        hidden: `[windows, tokens, hidden]` inputs of block 0; overwritten.
        store: where finished blocks are kept; blocks it has are not solved again.
        propagation: `sequential` calibrates block i on the outputs of the compressed blocks before it, `dense` on
            those of the original ones.
    """
    for index in range(model.blocks):
        result = store.get(index)
        if result is None:
            result = _solve_block(model, method, size, index, hidden, store, advance=propagation == "dense")
        elif propagation == "dense":
            run_block_(model, model.block(index, model.block_state(index)), index, hidden)
        if propagation == "sequential":
            shape = method.shapes[index].model_dump()
            run_block_(model, model.resized_block(index, result.state, shape, method.scaling(index)), index, hidden)
        yield result.report


def _solve_block(
    model: StreamedModel,
    method: Method,
    size: Dimensions,
    index: int,
    hidden: Tensor,
    store: BlockStore,
    *,
    advance: bool,
) -> BlockResult:
    """Observe, solve and keep one block; `advance` leaves the original block's outputs in `hidden`."""
    started = time.perf_counter()
    state = model.block_state(index)
    block = model.block(index, state)
    statistics = BlockStatistics(model.family, size)
    start, first = _observe(model, block, index, hidden, statistics, advance=advance)
    del block
    solution = method.solve(index, state, statistics)
    narrow = model.resized_block(index, solution.state, method.shapes[index].model_dump(), method.scaling(index))
    error = model.forward(narrow, start, index) - first
    before = sum(tensor.numel() for tensor in state.values())
    after = sum(tensor.numel() for tensor in solution.state.values() if tensor.is_floating_point())
    report = BlockReport(
        block=index,
        block_influence=statistics.influence.value(),
        sparsity=1 - after / before,
        parameters=CountBeforeAfter(before=before, after=after),
        relative_output_error=float(error.norm() / (first - start).norm().clamp_min(1e-30)),
        seconds=time.perf_counter() - started,
        modules=solution.modules,
    )
    result = BlockResult(index, solution.state, report)
    store.put(result)
    return result


def _observe(
    model: StreamedModel, block: nn.Module, index: int, hidden: Tensor, statistics: BlockStatistics, *, advance: bool
) -> tuple[Tensor, Tensor]:
    """Run the original block over all chunks; returns the first chunk's inputs and outputs."""
    start = hidden[next(chunks(hidden))].clone()
    first: Tensor = start
    with statistics.watching(block):
        for number, part in enumerate(chunks(hidden)):
            output = model.forward(block, hidden[part], index)
            statistics.influence.add(hidden[part], output)
            first = output if number == 0 else first
            if advance:
                hidden[part] = output
    return start, first
