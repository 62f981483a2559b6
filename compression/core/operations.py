"""Counting the operations of the linears that run, while they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from compression.core.timeline import Recorder


@contextmanager
def counted(recorder: Recorder) -> Iterator[None]:
    """Add multiply-adds times two of every `nn.Linear` that runs in this process to `recorder.flops`.

    What is counted is what was executed: an expert's rows are those routed to it, a forward pass that was left half-way
    counts half, a silenced linear (see `taps`) counts nothing. Attention scores, statistics and solves are not in it.
    """

    def add(module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if isinstance(module, nn.Linear) and "forward" not in module.__dict__ and isinstance(inputs[0], Tensor):
            recorder.flops += 2.0 * inputs[0].numel() * module.out_features

    handle = register_module_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
