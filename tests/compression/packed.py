"""Tiny models with packed weights, made without files and processes around them."""

from pathlib import Path

import torch

from api_schemas.methods import QuantizationConfig
from compression.core.artifact import Result, write_artifact
from compression.core.blockwise import compress_blocks
from compression.core.linear_walk import LinearStream
from compression.core.protocols import Streamed
from compression.core.streamed_model import StreamedModel
from compression.core.unwritten_model import NarrowedModel, QuantizedModel
from compression.quantizing import methods_of
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.quantized_linears import block_linears
from preflight.shapes import dense_shape
from tests.compression.walks import MemoryBlockStore, Walk


def pack_model(folder: Path, target: Path, step: QuantizationConfig, tokens: torch.Tensor) -> Streamed:
    """Quantise a stock model and write it; returns what was computed."""
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    model = StreamedModel(folder, family, checkpoint.tensors)
    shapes = (dense_shape(family, checkpoint.config),) * model.blocks
    return _pack(model, model, checkpoint.config, shapes, "portable", target, step, tokens)


def pack_walk(done: Walk, target: Path, step: QuantizationConfig, layout: str) -> Streamed:
    """Quantise a compressed model and write it; returns what was computed."""
    narrowed = NarrowedModel(done.model, done.method, done.store)
    return _pack(narrowed, done.model, done.config, done.method.shapes, layout, target, step, done.tokens)


def _pack(before, source, config, shapes, layout, target, step, tokens) -> Streamed:
    store = MemoryBlockStore()
    linears = block_linears(source.family, config, step.skip_modules, shapes, layout=layout, placed=source.placed)
    stream = LinearStream(before, methods_of(step, linears), before.embed(tokens))
    list(compress_blocks(before, stream, store))
    side_files = open_checkpoint(source.folder).side_files
    write_artifact(Result(source, config, side_files, store, shapes, layout, step), target, {"parent": "tiny"})
    return QuantizedModel(before, store)
