"""Writes an imported model: safetensors in shards, one tensor in memory at a time, complete or not at all."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from api_schemas.errors import Conflict, InvalidCheckpoint
from compression.core.linalg import all_finite
from compression.importers.ledger import FILE, Ledger
from preflight.shards import INDEX, SINGLE

SHARD_BYTES = 4 * 10**9
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when all went well, and vanishes otherwise.

    Raises:
        Conflict: `target_exists`.
    """
    if target.exists():
        raise Conflict("target_exists", f"{target} exists; remove it or name another folder", "target")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, sorted and indented."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    ledger: Ledger,
    targets: Mapping[str, Sequence[int]],
    folder: Path,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    shard_bytes: int = SHARD_BYTES,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write every target and the ledger; return the record that was written.

    Args:
        ledger: balanced against `targets`.
        targets: names and shapes.
        folder: where to.
        dtype: of the written tensors, or what says it for each.
        shard_bytes: largest size of one file.
        notes: what else the record shall say.

    Raises:
        InvalidCheckpoint: `overflow`: a finite weight has no finite value in the dtype.
    """
    dtype_of = dtype if callable(dtype) else lambda _: dtype
    shards = _shards(targets, dtype_of, shard_bytes)
    names = [
        SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        for number in range(len(shards))
    ]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(ledger, shard, targets, folder / name, dtype_of)
    written = sum(_bytes(targets[name], dtype_of(name)) for shard in shards for name in shard)
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": written}, "weight_map": placed})
    record = {**(notes or {}), **ledger.record(), "bytes": {"read": _read(ledger), "written": written}}
    write_json(folder / FILE, record)
    return record


def _read(ledger: Ledger) -> int:
    return sum(path.stat().st_size for source in ledger.sources.values() for path in source.files)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _shards(
    targets: Mapping[str, Sequence[int]], dtype_of: Callable[[str], torch.dtype], limit: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(targets):
        size = _bytes(targets[name], dtype_of(name))
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_shard(
    ledger: Ledger,
    names: Sequence[str],
    targets: Mapping[str, Sequence[int]],
    path: Path,
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """The header first, then one tensor after the other: never two results in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + _bytes(targets[name], dtype_of(name))
        header[name] = {"dtype": NAMES[dtype_of(name)], "shape": list(targets[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_raw(name, ledger.make(name), dtype_of(name)))
        file.flush()
        os.fsync(file.fileno())


def _raw(name: str, made: Tensor, dtype: torch.dtype) -> Any:
    cast = made.to(dtype)
    if cast.is_floating_point() and not all_finite(cast):
        largest = float(made.abs().max())
        raise InvalidCheckpoint(
            "overflow", f"{name} has values up to {largest:.3g}, too large for {dtype}; choose bfloat16", "dtype"
        )
    return cast.contiguous().reshape(-1).view(torch.uint8).numpy().data
