"""The forms in which a linear's weight is stored as codes: which tensors there are, and what they stand for.

A state names its own forms, so nothing has to be handed along with it, and the linears of one block may differ.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compression.core import grid, int8_rows, normal_float
from preflight.safetensors_header import TensorEntry


class Codes(Protocol):
    """A quantised weight in any form."""

    @property
    def bits(self) -> int:
        """Of one weight's code."""

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` that every reader computes with."""

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """What is stored for the linear instead of its weight."""


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        marker: the kind of tensor that tells it from the others.
        kinds: all its kinds of tensors.
        read: the weight of a linear from a state.
        counted: the kind whose entries count as parameters, and how many each stands for; None where a shape is stored.
    """

    marker: str
    kinds: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor], str], Tensor]
    counted: tuple[str, int] | None


_NORMAL = (
    *(normal_float.WEIGHT, normal_float.ABSMAX, normal_float.MAP, normal_float.FACTS),
    *(normal_float.NESTED_ABSMAX, normal_float.NESTED_MAP),
)
FORMS = (
    Form(grid.PACKED, (grid.PACKED, grid.SCALE, grid.SHAPE), grid.read_packed, None),
    Form(int8_rows.ABSMAX, (int8_rows.WEIGHT, int8_rows.ABSMAX, int8_rows.FORMAT), int8_rows.read_rows, ("weight", 1)),
    Form(normal_float.FACTS, _NORMAL, normal_float.read_normal, ("weight", 2)),
)


def packed_linears(names: Iterable[str]) -> dict[str, Form]:
    """The linears among these tensors whose weights are codes, with their forms."""
    return {
        name.removesuffix(f".{form.marker}"): form
        for name in names
        for form in FORMS
        if name.endswith(f".{form.marker}")
    }


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with each packed weight replaced by what it stands for."""
    packed = packed_linears(state)
    inside = _inside(packed)
    plain = {name: tensor for name, tensor in state.items() if name not in inside}
    return {**plain, **{f"{linear}.weight": form.read(state, linear) for linear, form in packed.items()}}


def count_parameters(state: Mapping[str, Tensor]) -> int:
    """Parameters of a model's tensors: packed weights count as what they stand for, their scales do not count."""
    packed = packed_linears(state)
    inside = _inside(packed)
    plain = sum(one.numel() for name, one in state.items() if name not in inside and one.is_floating_point())
    return plain + sum(
        int(state[f"{linear}.{grid.SHAPE}"].prod())
        if form.counted is None
        else state[f"{linear}.{form.counted[0]}"].numel() * form.counted[1]
        for linear, form in packed.items()
    )


def count_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of a model's weights, packed or not; not of what only says how a block is built, such as rotary pairs."""
    inside = _inside(packed_linears(state))
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in state.items()
        if name in inside or tensor.is_floating_point()
    )


def count_stored(tensors: Mapping[str, TensorEntry], read: Callable[[str], Tensor]) -> int:
    """Parameters of a folder's tensors, from headers; `read` is asked for shapes alone."""
    packed = packed_linears(tensors)
    inside = _inside(packed)
    plain = sum(
        entry.parameters for name, entry in tensors.items() if name not in inside and entry.dtype[0] not in "IU"
    )
    return plain + sum(
        int(read(f"{linear}.{grid.SHAPE}").prod())
        if form.counted is None
        else tensors[f"{linear}.{form.counted[0]}"].parameters * form.counted[1]
        for linear, form in packed.items()
    )


def _inside(packed: Mapping[str, Form]) -> set[str]:
    """The names of all tensors of these linears' codes."""
    return {f"{linear}.{kind}" for linear, form in packed.items() for kind in form.kinds}
