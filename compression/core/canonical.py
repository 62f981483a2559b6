"""Stored tensors to canonical ones and back: what is fused is parted, what is transposed is turned.

Canonical means one tensor `[out_features, in_features]` per linear, under the names of the family's table. Nothing is
computed: a round trip gives the same bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compression.core import int8_rows, normal_float
from compression.core.grid import PACKED, SCALE, SHAPE
from preflight.families import Dimensions, Family
from preflight.families.parts import Fused

KINDS = ("weight", "bias")
ROWS = (*KINDS, PACKED, SCALE, int8_rows.ABSMAX, normal_float.ABSMAX)  # one row for each output, or a flat run of it
ALIKE = (int8_rows.FORMAT, normal_float.MAP)  # the same for every linear


def to_canonical(family: Family, size: Dimensions, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The canonical tensors of one block of the stock model.

    Args:
        family: its table.
        size: of the model that the tensors belong to.
        stored: the block's tensors, named relative to it.
    """
    state = _turned(family, {family.canonical_block_name(name): tensor for name, tensor in stored.items()})
    for fused in family.fused:
        for kind in KINDS:
            whole = state.pop(f"{fused.stored}.{kind}", None)
            if whole is not None:
                parts = _part(fused, whole, _rows(family, size, fused), size.heads)
                state.update({f"{name}.{kind}": part for name, part in zip(fused.parts, parts, strict=True)})
    return state


def to_stored(family: Family, size: Dimensions, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the stock class loads; `size` is that of the model they belong to, after compression.

    Packed weights are joined as they are: each row is packed and scaled by itself.
    """
    stored = dict(state)
    for fused in family.fused:
        for kind in ROWS:
            names = [f"{part}.{kind}" for part in fused.parts]
            if names[0] in stored:
                stored[f"{fused.stored}.{kind}"] = _join(fused, [stored.pop(name) for name in names], size.heads)
        for kind in (*ALIKE, normal_float.FACTS):
            same = [stored.pop(f"{part}.{kind}") for part in fused.parts if f"{part}.{kind}" in stored]
            if same:
                stored[f"{fused.stored}.{kind}"] = same[0] if kind in ALIKE else normal_float.joined_facts(same)
        shapes = [stored.pop(f"{part}.{SHAPE}") for part in fused.parts if f"{part}.{SHAPE}" in stored]
        if shapes:
            rows = sum(int(shape[0]) for shape in shapes)
            stored[f"{fused.stored}.{SHAPE}"] = torch.tensor([rows, int(shapes[0][1])])
    return {family.stored_block_name(name): tensor for name, tensor in _turned(family, stored).items()}


def _turned(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    turned = {f"{name}.weight" for name in family.transposed}
    return {name: tensor.T.contiguous() if name in turned else tensor for name, tensor in tensors.items()}


def _rows(family: Family, size: Dimensions, fused: Fused) -> list[int]:
    """Rows of each part."""
    channels = {
        family.attention.query: size.heads * size.head_dim,
        family.attention.key: size.kv_heads * size.head_dim,
        family.attention.value: size.kv_heads * size.head_dim,
        **{linear: size.mlp_width for mlp in family.mlps(size) for linear in mlp.inputs},
    }
    return [channels[part] for part in fused.parts]


def _part(fused: Fused, whole: Tensor, rows: list[int], heads: int) -> list[Tensor]:
    if not fused.by_head:
        return [part.contiguous() for part in whole.split(rows)]
    by_head = whole.reshape(heads, -1, *whole.shape[1:])
    return [part.reshape(-1, *whole.shape[1:]) for part in by_head.chunk(len(rows), dim=1)]


def _join(fused: Fused, parts: list[Tensor], heads: int) -> Tensor:
    if not fused.by_head:
        return torch.cat(parts)
    by_head = torch.cat([part.reshape(heads, -1, *part.shape[1:]) for part in parts], dim=1)
    return by_head.reshape(-1, *parts[0].shape[1:])
