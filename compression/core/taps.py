"""Reading what flows inside a block: run it until a place is reached, and take what arrives there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compression.core.streamed_model import StreamedModel


class _Reached(BaseException):
    """Ends a forward pass at a tap; never leaves this file."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@contextmanager
def inputs_of(block: nn.Module, names: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Collect the inputs of modules during forward passes; the dictionary holds the latest of each.

    Args:
        block: a decoder block.
        names: our word for each tap to the module's name, relative to the block.
    """
    taken: dict[str, Tensor] = {}

    def tap(word: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taken[word] = inputs[0].float()

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(tap(word)) for word, name in names.items()]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silenced(block: nn.Module, linears: Sequence[str]) -> Iterator[None]:
    """These linears say nothing, without computing anything; who listens to what they are told goes on listening."""

    def silence(linear: nn.Linear) -> Any:
        return lambda states: states.new_zeros(*states.shape[:-1], linear.out_features)

    modules = [block.get_submodule(name) for name in linears]
    for module in modules:
        assert isinstance(module, nn.Linear)  # noqa: S101 (canonical blocks have no other)
        module.__dict__["forward"] = silence(module)  # before the class's; hooks stay
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def run_until(model: StreamedModel, block: nn.Module, hidden: Tensor, index: int, name: str) -> Tensor:
    """The input of module `name` when the block runs on `hidden`; nothing after it is computed."""

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0].float())

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        model.forward(block, hidden, index)
    except _Reached as reached:
        return reached.tensor
    finally:
        handle.remove()
    raise RuntimeError(f"the block has no module {name!r} on its path")
