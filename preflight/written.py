"""What an artifact would hold if no width changed: parameters, bytes of its tensors, and what files add to them."""

from dataclasses import dataclass

from preflight.checkpoint import Checkpoint
from preflight.families import Family
from preflight.tensor_check import OLD_BUFFERS, head_is_copy

SHARD_BYTES = 4 * 1024**3
FILE_HEADER = 8 + len('{"__metadata__":{"format":"pt"}}') + 8  # length, JSON around the entries, padding
INDEX_BYTES = 8  # of one kept rotary pair


@dataclass(frozen=True)
class Written:
    """Sizes of the artifact of an unchanged model.

    Attributes:
        parameters: of all parts; a head that is a copy of the embedding counts once, and buffers that every loader
            recomputes do not.
        bytes: of these tensors.
        bytes_per_parameter: what a parameter of a block frees when it goes; the least, where blocks mix types.
        overhead: bytes that the files add at most: headers, and in layout `full` the list of kept rotary pairs.
    """

    parameters: int
    bytes: int
    bytes_per_parameter: int
    overhead: int


def written(checkpoint: Checkpoint, family: Family, layout: str) -> Written:
    """Count what would be written in a layout."""
    config, prefix = checkpoint.config, family.blocks + "."
    head = f"{family.head}.weight" if head_is_copy(config, checkpoint.tensors) else None
    kept = {
        name: entry for name, entry in checkpoint.tensors.items() if name != head and not name.endswith(OLD_BUFFERS)
    }
    placed = checkpoint.placed
    others = {} if placed is None else placed.others
    total = sum(entry.bytes for entry in (*kept.values(), *others.values()))
    outside = {name: entry.shape for name, entry in kept.items() if not name.startswith(prefix)}
    pairs = _rotary_pairs(checkpoint, family) if layout == "full" else {}
    block = family.canonical_tensors(config) if layout == "full" else family.block_tensors(config)
    indices = range(family.block_count(config))
    named = {
        **{max(name, family.stored_name(name), key=len): shape for name, shape in outside.items()},
        **{family.block_prefix(index) + name: shape for index in indices for name, shape in block.items()},
        **pairs,
    }
    pair_bytes = INDEX_BYTES * sum(heads * count for heads, count in pairs.values())
    if placed is not None:
        named = {placed.disk_name(name): shape for name, shape in named.items()}
        named |= {name: entry.shape for name, entry in others.items()}
    headers = sum(len(_header_entry(name, shape, total + pair_bytes)) for name, shape in named.items())
    files = 1 + (total + pair_bytes) // (SHARD_BYTES // 2)
    return Written(
        parameters=sum(entry.parameters for entry in (*kept.values(), *others.values())),
        bytes=total,
        bytes_per_parameter=min(
            entry.bytes // entry.parameters
            for name, entry in kept.items()
            if name.startswith(prefix) and entry.parameters
        ),
        overhead=pair_bytes + headers + files * FILE_HEADER,
    )


def _rotary_pairs(checkpoint: Checkpoint, family: Family) -> dict[str, tuple[int, int]]:
    size = family.dimensions(checkpoint.config)
    return {
        f"{family.block_prefix(index)}{family.attention.module}.rotary_pairs": (
            size.kv_heads,
            size.rotary_in(index) // 2,
        )
        for index in range(size.blocks)
        if size.rotary_in(index)
    }


def _header_entry(name: str, shape: tuple[int, ...], end: int) -> str:
    """As safetensors writes it, at its longest: the numbers of a narrowed tensor have no more digits."""
    return f'"{name}":{{"dtype":"BF16","shape":{list(shape)},"data_offsets":[{end},{end}]}},'
