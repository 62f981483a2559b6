"""Compares the stored tensors with those that the configuration calls for."""

from collections.abc import Mapping
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.composites import Placed
from preflight.families import Family, resolve
from preflight.safetensors_header import TensorEntry
from preflight.strict_json import shown, shown_list

FLOATING = {"F64", "F32", "F16", "BF16"}
KEPT = FLOATING | {"I64", "I32"}  # what the parts around a decoder may hold: buffers of positions are whole numbers
# Recomputed by every loader. The dots matter: GPT-2's `attn.c_attn.bias` is a weight.
OLD_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
CHUNK_BYTES = 1024**2

Tensors = Mapping[str, TensorEntry]


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that config.json names, or an empty string.

    Raises:
        InvalidCheckpoint: `invalid_config`: `architectures` is not a list of names.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InvalidCheckpoint(
            "invalid_config", f"config.json: architectures is {shown(named)}, not a list of names", "architectures"
        )
    return named[0] if named else ""


def known_family(config: Mapping[str, Any]) -> Family | None:
    """The family whose tensors this checkpoint must have, or None: unknown, for another task, or quantised."""
    named = architecture_of(config)
    try:
        family = resolve(config)
    except InvalidCheckpoint as error:
        if error.code == "unsupported_architecture":
            return None
        raise
    return family if named in ("", family.architecture) and not config.get("quantization_config") else None


def check_tensors(config: Mapping[str, Any], tensors: Tensors) -> None:
    """Check that nothing a known architecture needs is absent or of another shape: nothing is ever initialised anew.

    Raises:
        InvalidCheckpoint: `missing_tensor`, `wrong_shape` or `invalid_config`.
    """
    family = known_family(config)
    if family is None:
        return
    size = family.dimensions(config)
    blocks = size.blocks
    if blocks * size.experts > len(tensors):  # before a list is made of what a hostile configuration asks for
        asked = f"{blocks} blocks" + (f" of {size.experts} experts" if size.experts > 1 else "")
        raise InvalidCheckpoint(
            "missing_tensor",
            f"config.json asks for {asked}; the file has {len(tensors)} tensors in all",
            "blocks",
        )
    required = family.required_tensors(config)
    head = stored_head(config, tensors)
    if head is not None:
        required[head] = required[f"{family.embeddings}.weight"]
    missing = [name for name in required if name not in tensors]
    if missing:
        raise InvalidCheckpoint(
            "missing_tensor",
            f"config.json asks for {shown_list(missing)}, which the weights do not have; push the complete model",
            missing[0],
        )
    for name, shape in required.items():
        if tensors[name].shape != shape:
            raise InvalidCheckpoint(
                "wrong_shape",
                f"tensor {name!r} is {shown(list(tensors[name].shape))}; config.json asks for {list(shape)}",
                name,
            )


def check_parts(placed: Placed) -> None:
    """Check that a checkpoint of several parts has them all; the reload proof compares every name.

    Raises:
        InvalidCheckpoint: `missing_tensor`: nothing of a part is stored.
    """
    parts = placed.others_by_part()
    for part, words in ((placed.composite.tower, placed.composite.vision), ("projector", placed.composite.projector)):
        if part not in parts:
            raise InvalidCheckpoint(
                "missing_tensor",
                f"config.json is that of a {placed.composite.model_type}, but no tensor of its {part} "
                f"({', '.join(words)}) is stored; push the complete model",
                words[0],
            )


def unexpected_tensors(config: Mapping[str, Any], tensors: Tensors) -> tuple[list[str], list[str]]:
    """Return the tensors that a known architecture has no use for, and the harmless old buffers among the rest."""
    family = known_family(config)
    if family is None:
        return [], []
    extra = tensors.keys() - family.required_tensors(config).keys() - {stored_head(config, tensors)}
    buffers = sorted(name for name in extra if name.endswith(OLD_BUFFERS))
    return sorted(extra - set(buffers)), buffers


def stored_head(config: Mapping[str, Any], tensors: Tensors) -> str | None:
    """The name of a head that is stored although the configuration ties it to the embedding, or None."""
    family = known_family(config)
    if family is None or not family.dimensions(config).tied_head:
        return None
    name = f"{family.head}.weight"
    return name if name in tensors else None


def head_is_copy(config: Mapping[str, Any], tensors: Tensors) -> bool:
    """Whether such a head is the embedding once more; compares their bytes until the first difference."""
    family, name = known_family(config), stored_head(config, tensors)
    return (
        family is not None and name is not None and _same_bytes(tensors[name], tensors[f"{family.embeddings}.weight"])
    )


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.bytes
        while left > 0:
            size = min(CHUNK_BYTES, left)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True
