"""Finds NaN and infinity in weights with bounded memory and without torch: they are bit patterns.

A floating-point number is not finite when all bits of its exponent are set. Sound weights almost never have even the
exponent's high bits set, so a search over every n-th byte decides nearly everything at the speed of the disk.
"""

import re
from collections.abc import Mapping
from typing import BinaryIO

from api_schemas.errors import InvalidCheckpoint
from preflight.safetensors_header import TensorEntry
from preflight.strict_json import shown

CHUNK_BYTES = 8 * 1024**2  # a multiple of every width
# dtype: bytes, what its highest byte can be when the number is not finite, bits of the byte below that must be set too
PATTERNS = {
    "F16": (2, re.compile(rb"[\x7c-\x7f\xfc-\xff]"), 0x00),
    "BF16": (2, re.compile(rb"[\x7f\xff]"), 0x80),
    "F32": (4, re.compile(rb"[\x7f\xff]"), 0x80),
    "F64": (8, re.compile(rb"[\x7f\xff]"), 0xF0),
}


def check_values(tensors: Mapping[str, TensorEntry]) -> None:
    """Read every floating-point weight once.

    Raises:
        InvalidCheckpoint: `nonfinite_weights`, naming the first tensor and element that is NaN or infinite.
    """
    for name, entry in tensors.items():
        found = first_nonfinite(entry)
        if found is not None:
            raise InvalidCheckpoint(
                "nonfinite_weights",
                f"tensor {shown(name)} has a NaN or an infinity at element {found}; push sound weights",
                name[:512],
            )


def first_nonfinite(entry: TensorEntry) -> int | None:
    """Return the flat index of the first NaN or infinity of a tensor, or None; integers have neither."""
    if entry.dtype not in PATTERNS:
        return None
    width = PATTERNS[entry.dtype][0]
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        for begin in range(0, entry.bytes, CHUNK_BYTES):
            found = _first_in(_read(file, min(CHUNK_BYTES, entry.bytes - begin), entry), entry.dtype)
            if found is not None:
                return begin // width + found
    return None


def _read(file: BinaryIO, size: int, entry: TensorEntry) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise InvalidCheckpoint("truncated_file", f"{entry.file.name} became shorter; push it again", entry.file.name)
    return data


def _first_in(data: bytes, dtype: str) -> int | None:
    width, high, low_bits = PATTERNS[dtype]
    below = data[width - 2 :: width]
    for match in high.finditer(data[width - 1 :: width]):
        if below[match.start()] & low_bits == low_bits:
            return match.start()
    return None
