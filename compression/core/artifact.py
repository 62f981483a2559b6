"""Writing the finished model: ordinary safetensors, its configuration, everything that stood beside the original.

Layout `portable` is a stock model folder. Where ranks shrank, one set F of rotary pairs serves all heads and blocks:
`head_dim` becomes the rank, `longrope` factors turn the stock frequencies θ^(−2j/r) into the kept ones, and the query
weights already carry √(r/d_h) (folded by the method). Layout `nemotron` has the original's attention and the MLP widths
of NVIDIA's `block_configs`. Layout `full` lists `block_shapes` for `compression.runtime`.
The folder appears by rename and holds nothing that depends on when or where it was made.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from api_schemas.methods import QuantizationConfig
from api_schemas.plans import BlockShape
from compression.core.block_store import sync_folder, write_durably
from compression.core.canonical import to_stored
from compression.core.protocols import BlockStore
from compression.core.quantized_config import Bits, bits_of, quantization_settings
from compression.core.streamed_model import StreamedModel
from compression.core.tower import tower_tensors
from compression.runtime.blocks import reduced_model_type
from compression.runtime.models import REDUCED
from compression.runtime.nemotron import ARCHITECTURE, MODEL_TYPE, block_configs
from preflight.code_budget import KEPT, tower_linears
from preflight.composites import Placed
from preflight.quantized_linears import block_linears

SHARD_BYTES = 1024**3  # a shard is in memory while it is collected
MANIFEST = "modepress.json"
SERVE = "serve.json"
NEVER_COPIED = {"config.json", "model.safetensors.index.json", "generation_config.json", MANIFEST, SERVE}


@dataclass(frozen=True)
class Result:
    """What the artifact is made of."""

    source: StreamedModel
    raw_config: Mapping[str, Any]
    side_files: Sequence[str]
    blocks: BlockStore
    shapes: Sequence[BlockShape]
    layout: str
    quantization: QuantizationConfig | None = None
    bits: Bits | None = None


def write_artifact(result: Result, folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Write the artifact into an absent or half-written `folder`, then seal it; the caller renames it into place.

    Returns:
        SHA-256 of every file but the manifest, which lists them.
    """
    write_model(result, folder)
    return seal(folder, manifest)


def write_model(result: Result, folder: Path) -> None:
    """Write weights, configuration and side files into an absent or half-written `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, drop_head = _config(result)
    placed = result.source.placed
    _write_shards(_tensors(result, drop_head) if placed is None else _in_place(result, placed, drop_head), folder)
    for name in result.side_files:
        if name not in NEVER_COPIED:
            shutil.copyfile(result.source.folder / name, _inside(folder, name))
    generation = result.source.folder / "generation_config.json"
    if generation.exists():
        write_durably(folder / generation.name, _json(sane_generation(json.loads(generation.read_text()))))
    write_durably(folder / "config.json", _json(config if placed is None else placed.config_with(config)))


def seal(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Write the manifest with the SHA-256 of every other file, sync the folder, and return the digests."""
    hashes = {
        path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    write_durably(folder / MANIFEST, _json({**manifest, "files": hashes}))
    sync_folder(folder)
    return hashes


def sane_generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop sampling settings that contradict `do_sample: false`, which make stock code refuse to save the model."""
    if settings.get("do_sample", False):
        return settings
    sampling = ("temperature", "top_p", "top_k", "min_p", "typical_p")
    return {name: value for name, value in settings.items() if name not in sampling}


def longrope(inverse_frequencies: Tensor, pairs: Tensor, theta: float, positions: int) -> dict[str, Any]:
    """Rotary settings under which stock code of `head_dim = 2·len(pairs)` turns by the kept pairs' frequencies.

    Args:
        inverse_frequencies: `[d_h / 2]` of the original model, any static scaling included.
        pairs: kept pairs, ascending.
        theta: the base.
        positions: `max_position_embeddings`; equal to the original length, so that stock code scales nothing.
    """
    rank = 2 * len(pairs)
    stock = theta ** -(torch.arange(0, rank, 2, dtype=torch.float64) / rank)
    factors = (stock / inverse_frequencies.double()[pairs]).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def _config(result: Result) -> tuple[dict[str, Any], bool]:
    """The artifact's configuration, and whether a redundant head tensor is left out."""
    source, family, shape = result.source, result.source.family, result.shapes[0]
    config = {key: value for key, value in result.raw_config.items() if key not in {"auto_map", "_name_or_path"}}
    config["transformers_version"] = transformers.__version__
    if result.quantization is not None:
        step, placed = result.quantization, source.placed
        linears = block_linears(family, config, step.skip_modules, result.shapes, layout=result.layout, placed=placed)
        bits = result.bits or bits_of(step, linears)
        config["quantization_config"] = quantization_settings(step, linears, bits, family.head, placed)
    head, embeddings = f"{family.head}.weight", f"{family.embeddings}.weight"
    drop_head = False
    size = family.dimensions(config)
    if size.tied_head and head in source.tensors:
        drop_head = bool(torch.equal(source.read(head), source.read(embeddings)))
        config["tie_word_embeddings"] = drop_head
    if result.layout == "full":
        if family.alone:
            model = REDUCED[family.name][1]
            config.update(model_type=reduced_model_type(family.name), architectures=[model.__name__])
        config["block_shapes"] = [shape.model_dump() for shape in result.shapes]
        return config, drop_head
    if result.layout == "nemotron":
        widths = [shape.mlp_width for shape in result.shapes]
        config.update(model_type=MODEL_TYPE, architectures=[ARCHITECTURE], head_dim=size.head_dim)
        config["block_configs"] = block_configs(widths, size.group)
        return config, drop_head
    config[family.keys.get("intermediate_size", "intermediate_size")] = shape.mlp_width
    if shape.query_key_rank != size.head_dim:
        rotated = next((index for index in range(size.blocks) if size.rotary_in(index)), None)
        config["head_dim"] = shape.query_key_rank
        if rotated is None:
            return config, drop_head
        pairs = _block_state(result, rotated)[_rotary_pairs(result)][0]
        positions = int(source.config.max_position_embeddings)
        theta = float(source.config.rope_parameters["rope_theta"])
        config["rope_parameters"] = longrope(source.inverse_frequencies, pairs, theta, positions)
        for old in ("rope_scaling", "rope_theta"):
            config.pop(old, None)
    return config, drop_head


def _tensors(result: Result, drop_head: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact in a fixed order."""
    source, family = result.source, result.source.family
    for name in sorted(source.tensors):
        if not name.startswith(f"{family.blocks}.") and not (drop_head and name == f"{family.head}.weight"):
            yield name if result.layout == "full" else family.stored_name(name), source.read(name)
    for index in range(len(result.shapes)):
        state = _block_state(result, index)
        if result.layout != "full":
            state.pop(_rotary_pairs(result), None)
            state = to_stored(family, source.size, state)
        for name, tensor in sorted(state.items()):
            yield family.block_prefix(index) + name, tensor


def _in_place(result: Result, placed: Placed, drop_head: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a composite under their names on disk: the parts around the decoder are not touched."""
    for name, tensor in _tensors(result, drop_head):
        yield placed.disk_name(name), tensor
    coded = {} if result.bits is None or result.bits.tower == KEPT else tower_linears(placed)
    for name, entry in sorted(placed.others.items()):
        yield from tower_tensors(name, entry, coded)


def _rotary_pairs(result: Result) -> str:
    return f"{result.source.family.attention.module}.rotary_pairs"


def _block_state(result: Result, index: int) -> dict[str, Tensor]:
    block = result.blocks.get(index)
    if block is None:
        raise RuntimeError(f"block {index} vanished from the block store between solving and writing")
    return dict(block.state)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write shards of at most `SHARD_BYTES`, one in memory at a time; an index where there are several."""
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    total = held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > SHARD_BYTES:
            shards.append(_write_shard(pending, folder, len(shards)))
            pending, held = {}, 0
        pending[name] = tensor.contiguous()
        weight_map[name] = len(shards)
        held, total = held + size, total + size
    shards.append(_write_shard(pending, folder, len(shards)))
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[at] for name, at in weight_map.items()}}
    write_durably(folder / "model.safetensors.index.json", _json(index))


def _write_shard(tensors: dict[str, Tensor], folder: Path, number: int) -> Path:
    path = folder / f"shard-{number:05d}.partial"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes 0600; other processes of the service must read it
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
