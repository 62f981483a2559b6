"""How much the loss minds an error in each block's two outputs: one backward pass, a block in memory at a time.

With g the gradient of the summed next-token loss at an output, an error δ there changes the mean loss by about
½ E[(gᵀδ)²] = ½ tr(F E[δδᵀ]) with F = E[g gᵀ] (Gauss–Newton with the empirical Fisher; g and δ taken as independent).
F is the metric in which units are chosen and the price in which budgets are spent. Nothing is trained.

Of several experts F is that of their sum. Expert e's own error δ_e on the tokens it sees counts there as w δ_e, so it
costs about ½ E[w²] tr(F E_e[δ_e δ_eᵀ]), E[w²] over all tokens: the routing weight w and δ_e are taken as independent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compression.core.blockwise import chunks, head_rows, run_block_
from compression.core.parallel import WHOLE, Share
from compression.core.statistics import BlockStatistics
from compression.core.streamed_model import StreamedModel
from compression.core.timeline import span
from preflight.families import Dimensions


@dataclass(frozen=True)
class Metrics:
    """F of a block's attention output and MLP output, `[hidden, hidden]` float64, in squared nats per token.

    `routing` is E[w²] of each expert's weight over all tokens; one 1 without a router.
    """

    attention: Tensor
    mlp: Tensor
    routing: tuple[float, ...] = (1.0,)


Visit = Callable[[int, nn.Module, Tensor, BlockStatistics, Metrics], None]


def walk_backward(model: StreamedModel, size: Dimensions, tokens: Tensor, visit: Visit, share: Share = WHOLE) -> None:
    """Visit the blocks from last to first with their statistics and metrics.

    Args:
        model: the original.
        size: its sizes.
        tokens: `[windows, tokens]`; the inputs of all blocks are held, so this is a part of the calibration set.
        visit: called with index, block, its inputs `[windows, tokens, hidden]`, statistics and metrics.
        share: which part of all windows `tokens` is, perhaps none; statistics and metrics are those of all windows.
    """
    inputs = []
    with torch.no_grad():
        hidden = model.embed(tokens)
        for index in range(model.blocks):
            inputs.append(hidden.clone())
            run_block_(model, model.block(index, model.block_state(index)), index, hidden)
    gradient = _loss_gradient(model, hidden, tokens)
    for index in reversed(range(model.blocks)):
        block = model.block(index, model.block_state(index))
        statistics = BlockStatistics(model.family, size, share, mixed=True)
        metrics = _backward_(model, block, index, inputs[index], gradient, statistics)
        with torch.no_grad():
            visit(index, block, inputs[index], statistics, metrics)
        inputs.pop()


def _loss_gradient(model: StreamedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of the summed next-token loss at the last block's outputs, `[windows, tokens, hidden]`."""
    gradient, tokens = torch.zeros_like(hidden), tokens.to(hidden.device)
    with model.head() as head:
        for window in range(len(hidden)):
            for start in range(0, hidden.shape[1] - 1, head_rows()):
                rows = slice(start, min(start + head_rows(), hidden.shape[1] - 1))
                targets = tokens[window, rows.start + 1 : rows.stop + 1]
                states = hidden[window, rows].detach().requires_grad_(True)
                loss = nn.functional.cross_entropy(head(states), targets, reduction="sum")
                gradient[window, rows] = torch.autograd.grad(loss, states)[0]
    return gradient


def _backward_(
    model: StreamedModel, block: nn.Module, index: int, inputs: Tensor, gradient: Tensor, statistics: BlockStatistics
) -> Metrics:
    """Pull `gradient` from the block's outputs to its inputs, in place; returns the metrics on the way."""
    names = {"attention": model.family.attention.output, "mlp": model.family.mlp_output}
    square = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64, device=inputs.device)
    sums = {name: square.clone() for name in names}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, linear in names.items():
        module = block.get_submodule(linear)
        handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out})))
    with statistics.watching(block), _routing(model, block) as routing:
        for part in chunks(inputs):
            start = inputs[part].detach().requires_grad_(True)
            with torch.enable_grad():
                end = model.forward(block, start, index)
            with span("forward", "backward", block=index):
                pulled = torch.autograd.grad(end, (start, *outputs.values()), gradient[part])
            for name, at_output in zip(outputs, pulled[1:], strict=True):
                flat = at_output.float().reshape(-1, at_output.shape[-1])
                sums[name] += flat.T @ flat
            gradient[part] = pulled[0]
    for handle in handles:
        handle.remove()
    count = torch.tensor(float(inputs.shape[0] * inputs.shape[1]), dtype=torch.float64)
    for total in (*sums.values(), routing, count):
        statistics.share.group.sum_(total)
    return Metrics(sums["attention"] / count, sums["mlp"] / count, tuple((routing / count).tolist()))


@contextmanager
def _routing(model: StreamedModel, block: nn.Module) -> Iterator[Tensor]:
    """Σ w² of each expert's weights `[experts]` over the tokens that pass meanwhile; without a router, their number."""
    experts, squares = model.family.experts, torch.zeros(model.size.experts, dtype=torch.float64)

    def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if experts is None:
            squares[0] += inputs[0].shape[:-1].numel()
        else:
            chosen, weights = inputs[1].flatten(), inputs[2].detach().flatten().double()
            squares.index_add_(0, chosen, weights.square())

    handle = block.get_submodule(model.family.mlp_output).register_forward_pre_hook(add)
    try:
        yield squares
    finally:
        handle.remove()
