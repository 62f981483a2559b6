"""Reads the header of a safetensors file and nothing else, trusting none of it."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.strict_json import parse_object, shown

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 64
LENGTH_BYTES = 8
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `file[start:end]`, both counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file in the order of their bytes, without reading any of them.

    Raises:
        InvalidCheckpoint: `truncated_file`, `header_too_large` or `invalid_header`; `param` is the file's name.
    """
    data, total = _header_bytes(path)
    header = parse_object(data, "invalid_header", f"the header of {path.name}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid(path, "__metadata__ is not an object of strings")
    first = LENGTH_BYTES + len(data)
    entries = [_entry(path, name, value, first) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_layout(path, entries, first, total)
    return {entry.name: entry for entry in entries}


def _invalid(path: Path, what: str) -> InvalidCheckpoint:
    return InvalidCheckpoint("invalid_header", f"{path.name}: {what}; write the file again with safetensors", path.name)


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON and the file's size; lengths are checked before anything is read."""
    total = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise InvalidCheckpoint(
                "truncated_file", f"{path.name} has {total} bytes, too few for a header; push it again", path.name
            )
        length = struct.unpack("<Q", prefix)[0]
        if length > MAX_HEADER_BYTES:
            raise InvalidCheckpoint(
                "header_too_large",
                f"{path.name} announces a header of {length} bytes, more than {MAX_HEADER_BYTES}; "
                "this is no safetensors file",
                path.name,
            )
        if LENGTH_BYTES + length > total:
            raise InvalidCheckpoint(
                "truncated_file",
                f"{path.name} announces a header of {length} bytes but has only {total} in all; push it again",
                path.name,
            )
        data = file.read(length)
    if not data.startswith(b"{"):
        raise _invalid(path, "the header does not begin with '{'")
    return data, total


def _entry(path: Path, name: str, value: Any, first: int) -> TensorEntry:
    where = f"tensor {shown(name)}"
    if not name or not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(path, f"{where} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _invalid(path, f"{where} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(length) for length in shape):
        raise _invalid(path, f"{where} has the impossible shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _invalid(path, f"{where} has the impossible data_offsets {shown(offsets)}")
    start, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        raise _invalid(
            path, f"{where} takes {shown(end - start)} bytes, but {dtype} × {shown(shape)} is {shown(bits // 8)}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, first + start, first + end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_layout(path: Path, entries: list[TensorEntry], first: int, total: int) -> None:
    """Each byte after the header belongs to exactly one tensor."""
    position = first
    for entry in entries:
        if entry.start != position:
            what = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise _invalid(path, f"tensor {shown(entry.name)} {what} (byte {entry.start} instead of {position})")
        position = entry.end
    if position > total:
        raise InvalidCheckpoint(
            "truncated_file", f"{path.name} has {total} of {position} bytes; push it again", path.name
        )
    if position < total:
        raise _invalid(path, f"{total - position} bytes after the last tensor belong to none")
