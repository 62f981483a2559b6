"""One table of all tensors of a checkpoint, whether in one file or in shards with an index."""

from pathlib import Path
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.safetensors_header import TensorEntry, read_header
from preflight.strict_json import read_object, shown, shown_list

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
VENDOR_COPY = "consolidated"  # Mistral publishes its weights a second time under this name, in its own layout
MAX_INDEX_BYTES = 100_000_000


def read_tensors(folder: Path, files: tuple[str, ...]) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Return all tensors by name, and warnings about what was left aside.

    Args:
        folder: the model folder.
        files: names of the files in it.

    Raises:
        InvalidCheckpoint: `no_weights`, `missing_index`, `ambiguous_weights`, `invalid_index`, `unsafe_shard_name`,
            `missing_shard`, `unindexed_shard`, `duplicate_tensor`, `unindexed_tensor`, `missing_tensor`, and all of
            `read_header`.
    """
    weights = [name for name in files if name.endswith(SUFFIX) and not name.startswith(VENDOR_COPY)]
    copies = [name for name in files if name.endswith(SUFFIX) and name.startswith(VENDOR_COPY)]
    warnings = tuple(f"{name} was ignored: it is the vendor's second copy of the weights" for name in copies)
    if INDEX in files:
        tensors, more = _read_shards(folder, weights)
        warnings += more
    else:
        _check_single(weights)
        tensors = read_header(folder / SINGLE)
    if not tensors:
        raise InvalidCheckpoint("no_weights", f"{SINGLE} holds no tensor; push the weights", SINGLE)
    return tensors, warnings


def _check_single(weights: list[str]) -> None:
    """Without an index the weights are in one file of the usual name."""
    if not weights:
        raise InvalidCheckpoint("no_weights", f"no {SINGLE} and no {INDEX}; push the weights as safetensors", SINGLE)
    if SINGLE not in weights:
        raise InvalidCheckpoint(
            "missing_index",
            f"{shown_list(weights)} without {INDEX}; push the index too, or name a single file {SINGLE}",
            INDEX,
        )
    if len(weights) > 1:
        raise _unindexed([name for name in weights if name != SINGLE])


def _unindexed(names: list[str]) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        "unindexed_shard",
        f"{shown_list(names)}: weights that no index names; remove them or push their index",
        names[0],
    )


def _read_shards(folder: Path, weights: list[str]) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    index = read_object(folder / INDEX, "invalid_index", max_bytes=MAX_INDEX_BYTES)
    placed = _weight_map(index)
    named = sorted(set(placed.values()))
    _check_shard_names(weights, named)
    tensors: dict[str, TensorEntry] = {}
    for shard in named:
        for name, entry in read_header(folder / shard).items():
            if name in tensors:
                raise InvalidCheckpoint(
                    "duplicate_tensor", f"tensor {shown(name)} is in {tensors[name].file.name} and in {shard}", name
                )
            tensors[name] = entry
    _compare(placed, tensors)
    return tensors, _size_warning(index, tensors)


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise InvalidCheckpoint(
            "invalid_index", f"{INDEX}: weight_map is not an object of tensor names and files", INDEX
        )
    return placed


def _check_shard_names(weights: list[str], named: list[str]) -> None:
    for shard in named:
        if not shard.endswith(SUFFIX) or any(mark in shard for mark in ("/", "\\", "\0", ":")):
            raise InvalidCheckpoint(
                "unsafe_shard_name",
                f"{INDEX} names the shard {shown(shard)}; only a {SUFFIX} file beside the index will do",
                INDEX,
            )
    missing = [shard for shard in named if shard not in weights]
    if missing:
        raise InvalidCheckpoint(
            "missing_shard", f"{INDEX} names {shown_list(missing)}; push these files too", missing[0]
        )
    extra = [name for name in weights if name not in named]
    if SINGLE in extra:
        raise InvalidCheckpoint(
            "ambiguous_weights", f"both {SINGLE} and {INDEX} are here and disagree; remove one of them", SINGLE
        )
    if extra:
        raise _unindexed(extra)


def _compare(placed: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    """The index and the shards name the same tensors in the same files."""
    unindexed = sorted(tensors.keys() - placed.keys())
    if unindexed:
        raise InvalidCheckpoint(
            "unindexed_tensor", f"{shown_list(unindexed)}: in a shard but not in {INDEX}; push the right index", INDEX
        )
    absent = sorted(name for name, shard in placed.items() if name not in tensors or tensors[name].file.name != shard)
    if absent:
        raise InvalidCheckpoint(
            "missing_tensor",
            f"{shown_list(absent)}: in {INDEX} but not in the shard it names; push it again",
            absent[0],
        )


def _size_warning(index: dict[str, Any], tensors: dict[str, TensorEntry]) -> tuple[str, ...]:
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.bytes for entry in tensors.values())
    return () if stated in (None, total) else (f"{INDEX} states {shown(stated)} bytes; the shards hold {total}",)
