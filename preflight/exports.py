"""Whether an artifact can be written in a foreign format: asked before the job runs, and when a file is written."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from api_schemas.exports.gguf import GgufExport, GgufType
from api_schemas.exports.onnx import OnnxExport
from api_schemas.plans import Blocker, BlockShape
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint
from preflight.families import Dimensions, Family
from preflight.gguf_rules import BLOCK_ROW, architecture_for, gguf_tokenizer
from preflight.rotary import STATIC_ROTARY, is_portable_longrope, rope_type, window_of
from preflight.rows import row_lengths

BITS = {"f32": 32.0, "bf16": 16.0, "q8_0": 8 + 16 / BLOCK_ROW}


def export_blockers(
    checkpoint: Checkpoint, family: Family, recipe: Recipe, shapes: Sequence[BlockShape]
) -> list[Blocker]:
    """Why one of the recipe's exports cannot be written, by name."""
    layout, found = recipe.layout, []
    for index, export in enumerate(recipe.exports):
        where = f"recipe.exports.{index}"
        if isinstance(export, GgufExport):
            reduced = shapes[0].query_key_rank != family.dimensions(checkpoint.config).head_dim
            refusals = gguf_refusals(checkpoint.folder, checkpoint.config, family, layout, reduced_attention=reduced)
            found += [Blocker(code=code, message=f"export gguf: {why}", param=where) for code, why in refusals]
        elif isinstance(export, OnnxExport):
            refusals = onnx_refusals(checkpoint.config, family)
            found += [Blocker(code=code, message=f"export onnx: {why}", param=where) for code, why in refusals]
        elif layout != "nemotron":
            found.append(Blocker(code="vllm_layout", message=_no_vllm_export(layout), param=where))
    return found


def _no_vllm_export(layout: str) -> str:
    if layout == "portable":
        return "export vllm: vLLM loads layout 'portable' as it is; leave the export out"
    return f"export vllm: vLLM has no class for layout {layout!r}; use layout 'portable' or 'nemotron'"


def gguf_refusals(
    folder: Path, config: Mapping[str, Any], family: Family, layout: str, *, reduced_attention: bool
) -> Iterator[tuple[str, str]]:
    """Codes and reasons why a GGUF file would be impossible or wrong.

    Args:
        folder: holds the tokenizer.
        config: of the model whose rotary settings and window the file would have.
        family: its table.
        layout: of the artifact.
        reduced_attention: whether heads have lost rotary pairs.
    """
    if config.get("quantization_config"):
        yield "export_of_codes", "its weights are packed; export the model from before it was quantised"
        return
    architecture = architecture_for(family.name, layout)
    if architecture is None:
        yield "gguf_family", f"llama.cpp has no architecture for {family.name} in layout {layout!r}; leave it out"
        return
    kind = rope_type(config)
    if kind not in STATIC_ROTARY and not is_portable_longrope(config):
        yield "gguf_rotary", f"rotary type {kind!r} cannot be written as fixed factors; leave it out"
    elif not architecture.rope_freqs and (reduced_attention or kind != "default"):
        yield (
            "gguf_rotary",
            f"llama.cpp's {architecture.name!r} turns by the stock frequencies only; use modules ['mlp'] and a model "
            "without rotary scaling, or leave it out",
        )
    size = family.dimensions(config)
    if architecture.square and size.heads * size.head_dim != size.hidden:
        yield (
            "gguf_heads",
            f"llama.cpp's {architecture.name!r} wants heads × head_dim to be hidden_size {size.hidden}, not "
            f"{size.heads * size.head_dim}; leave it out",
        )
    window = window_of(config)
    if window is not None:
        yield "gguf_window", f"llama.cpp ignores the window of {window} tokens for this architecture; leave it out"
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        yield "gguf_activation", f"llama.cpp computes silu, not hidden_act {activation!r}; leave it out"
    if family.has_qk_norm(config) and config.get("attention_bias"):
        yield "gguf_bias", f"llama.cpp's {architecture.name!r} has no bias on the output projection; leave it out"
    tokenizer = gguf_tokenizer(folder)
    if isinstance(tokenizer, str):
        yield "gguf_tokenizer", f"{tokenizer}; leave it out, or push the model with such a tokenizer"


def onnx_refusals(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, str]]:
    """Codes and reasons why an ONNX graph would be impossible or wrong; `config` is the original's or an artifact's."""
    if config.get("quantization_config"):
        yield "export_of_codes", "its weights are packed; export the model from before it was quantised"
    if family.experts is not None:
        yield (
            "onnx_experts",
            f"a graph has no loop over the experts that tokens choose, which {family.name} needs; leave it out",
        )
    kinds = _rope_types(config)
    odd = sorted(kinds - {*STATIC_ROTARY, "yarn"})
    if odd and not is_portable_longrope(config):
        yield (
            "onnx_rotary",
            f"rotary type {odd[0]!r} changes its frequencies with the length of the text, which a graph cannot; leave "
            "it out",
        )


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """Rotary types of all layer types."""
    parameters = config.get("rope_parameters") or {}
    nested = [one for one in parameters.values() if isinstance(one, Mapping)]
    return {rope_type({"rope_parameters": one}) for one in nested} or {rope_type(config)}


def onnx_bytes(size: Dimensions, parameters: int, export: OnnxExport) -> int:
    """About how large a graph with its tensors will be."""
    if export.weights == "float32":
        return parameters * 4
    eight = 1 + 4 / export.block
    four = 0.5 + 4.5 / export.block
    outer = min(parameters, size.vocabulary * size.hidden * (1 if size.tied_head else 2))
    return int(outer * eight + (parameters - outer) * (four if export.weights == "int4" else eight))


def gguf_bytes(size: Dimensions, parameters: int, shapes: Sequence[BlockShape], dtype: GgufType) -> int:
    """About how large a GGUF file will be: rows that cannot be quantised count 16 bits, all else the type's."""
    bits = BITS[dtype]
    if dtype == "q8_0" and any(length % BLOCK_ROW for rows in row_lengths(size, shapes).values() for length in rows):
        bits = 16.0
    return int(parameters * bits / 8)


def export_bytes(recipe: Recipe, size: Dimensions, parameters: int, shapes: Sequence[BlockShape]) -> int:
    """Bytes that the recipe's exports add to the artifact."""
    total = 0
    for export in recipe.exports:
        if isinstance(export, GgufExport):
            total += gguf_bytes(size, parameters, shapes, export.dtype)
        elif isinstance(export, OnnxExport):
            total += onnx_bytes(size, parameters, export)
    return total
