"""A model folder as one GGUF file: llama.cpp's format, with the rotary factors that its own converter leaves out.

Reference: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's graphs `llama`, `deci`, `qwen2`, `qwen3`.

- Rotary frequencies other than θ^(−2j/r) become the tensor `rope_freqs` [r/2] = θ^(−2j/r) / frequency, by which the
  graph divides its angles. There is no `rope.scaling.type`: with `longrope` the graph would look for other tensors.
- `llama` and `deci` turn neighbouring channels (2i, 2i + 1) where transformers turns halves (i, i + r/2): rows of query
  and key are put in that order.
- Matrices have the asked type. A row that is no multiple of 32 cannot be quantised and stays in 16 bits, as in
  llama.cpp's own quantiser; norms, biases and factors are float32.

One tensor at a time is in memory; the finished file is read back and compared.

    python -m compression.exporters.gguf FOLDER TARGET.gguf [--dtype q8_0]
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from gguf.tensor_mapping import get_tensor_name_map

from api_schemas.errors import JobFailed, ModepressError
from api_schemas.exports.gguf import GgufType
from api_schemas.reports import ExportReport
from compression.exporters.gguf_keys import file_keys
from compression.exporters.gguf_tokenizer import tokenizer_keys
from compression.exporters.source import ExportSource, open_source
from preflight.gguf_rules import BLOCK_ROW

TYPES: dict[GgufType, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES: dict[GgufType, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
MAX_ERROR: dict[GgufType, float] = {"f32": 0.0, "bf16": 2.0**-8, "q8_0": 0.02}  # of ‖W‖; larger is a wrong file
ARCHITECTURES = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
FACTORS = "rope_freqs.weight"


def write_gguf(folder: Path, target: Path, dtype: GgufType) -> ExportReport:
    """Write a model folder as a GGUF file, then read it back.

    Args:
        folder: layout `portable` or `nemotron`, or a stock model of a family that llama.cpp knows.
        target: the file; its folder is made when absent. Whole or absent afterwards.
        dtype: of the matrices.

    Raises:
        InvalidRecipe: the format cannot express the model; codes of `preflight.exports.gguf_refusals`.
        JobFailed: `export_mismatch`.
    """
    source = open_source(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        types = _write(source, partial, dtype)
        error = _read_back(source, partial, dtype)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    kept = sum(1 for kind in types.values() if dtype == "q8_0" and kind.name in ("BF16", "F16"))
    notes = (f"{kept} matrices stay in 16 bits: their rows are no multiple of {BLOCK_ROW}",) if kept else ()
    return ExportReport(
        format="gguf",
        target=f"exports/{target.name}",
        bytes=target.stat().st_size,
        architecture=source.architecture.name,
        tensors=dict(sorted(Counter(kind.name for kind in types.values()).items())),
        relative_error=error,
        notes=notes,
    )


def _write(source: ExportSource, path: Path, dtype: GgufType) -> dict[str, GGMLQuantizationType]:
    """Header, keys, then one tensor after the other; returns the type of each."""
    writer = GGUFWriter(path, source.architecture.name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    file_keys(writer, source)
    tokenizer_keys(writer, source)
    names = _names(source)
    types = {ours: _type(source, stored, dtype) for ours, stored in names.items()}
    factors = source.rope_factors
    for ours, stored in names.items():
        shape = source.model.tensors[stored].shape
        count = quant_shape_to_byte_shape(shape, types[ours])
        writer.add_tensor_info(ours, shape, np.dtype(np.float32), int(np.prod(count)), raw_dtype=types[ours])
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours, stored in names.items():
        writer.write_tensor_data(np.ascontiguousarray(quantize(_values(source, stored), types[ours])))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())
    writer.close()
    return types if factors is None else {**types, FACTORS: GGMLQuantizationType.F32}


def _names(source: ExportSource) -> dict[str, str]:
    """Names in the file to names in the folder, in the file's order: embedding, blocks, norm and head."""
    known = get_tensor_name_map(ARCHITECTURES[source.architecture.name], source.size.blocks)
    family = source.model.family
    outer = (f"{family.embeddings}.", f"{family.blocks}.")

    def order(name: str) -> tuple[int, int, str]:
        if name.startswith(outer[1]):
            return 1, int(name.removeprefix(outer[1]).partition(".")[0]), name
        return (0, 0, name) if name.startswith(outer[0]) else (2, 0, name)

    named = {}
    for stored in sorted(source.model.tensors, key=order):
        ours = known.get_name(stored, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise JobFailed("export_mismatch", f"export gguf: {source.architecture.name} has no tensor for {stored}")
        named[ours] = stored
    return named


def _type(source: ExportSource, stored: str, dtype: GgufType) -> GGMLQuantizationType:
    entry = source.model.tensors[stored]
    if len(entry.shape) < 2:
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and entry.shape[-1] % BLOCK_ROW:
        return GGMLQuantizationType.BF16 if entry.dtype == "BF16" else GGMLQuantizationType.F16
    return TYPES[dtype]


def _values(source: ExportSource, stored: str) -> np.ndarray:
    """A tensor in float32, rows in llama.cpp's order."""
    values = source.model.read(stored).to(torch.float32).numpy()
    heads = source.rotated_heads(stored)
    if heads is None or not source.architecture.permuted:
        return values
    rows, rest = values.shape[0], values.shape[1:]
    return np.ascontiguousarray(values.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest))


def _read_back(source: ExportSource, path: Path, dtype: GgufType) -> float:
    """The largest relative error of a tensor, as a reader sees the file.

    Raises:
        JobFailed: `export_mismatch`: a tensor is absent or differs by more than its number format explains.
    """
    worst, names = 0.0, _names(source)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise JobFailed("export_mismatch", f"export gguf: the file lacks {missing[:5]}")
    for ours, stored in names.items():
        wanted = _values(source, stored).astype(np.float64)
        read = dequantize(tensors[ours].data, tensors[ours].tensor_type).reshape(wanted.shape)
        error = float(np.linalg.norm(read - wanted) / max(float(np.linalg.norm(wanted)), 1e-300))
        if not error <= MAX_ERROR[dtype]:
            raise JobFailed("export_mismatch", f"export gguf: {ours} reads back with a relative error of {error:.3g}")
        worst = max(worst, error)
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr that names what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m compression.exporters.gguf", description="safetensors to GGUF")
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--dtype", choices=list(TYPES), default="q8_0")
    asked = parser.parse_args(arguments)
    try:
        report = write_gguf(asked.folder, asked.target, asked.dtype)
    except ModepressError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 1
    sys.stdout.write(f"{asked.target}: {report.bytes} bytes, {report.architecture}, {report.tensors}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
