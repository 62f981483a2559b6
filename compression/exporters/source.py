"""What an exporter reads: a finished model folder, and what it means to a foreign runtime."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from api_schemas.errors import InvalidRecipe
from compression.core.streamed_model import StreamedModel
from compression.runtime.nemotron import MODEL_TYPE, mlp_widths
from preflight.exports import gguf_refusals
from preflight.families import Dimensions, Family, resolve, table
from preflight.gguf_rules import GgufArchitecture, architecture_for

NEGLIGIBLE = 1e-6  # factors this near to 1 are rounding of the stock frequencies


@dataclass(frozen=True)
class ExportSource:
    """A model folder that can be written as GGUF.

    Attributes:
        model: its tensors, one at a time.
        config: its config.json.
        architecture: how llama.cpp knows it.
        widths: of each block's MLP.
    """

    model: StreamedModel
    config: Mapping[str, Any]
    architecture: GgufArchitecture
    widths: tuple[int, ...]

    @property
    def size(self) -> Dimensions:
        """Its sizes."""
        return self.model.size

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.model.config.rope_parameters["rope_theta"])

    @cached_property
    def rope_factors(self) -> np.ndarray | None:
        """Factors `[r / 2]` by which the stock frequencies are divided, float32, or None where they are the stock ones.

        f_j = θ^(−2j/r) / frequency_j, with all static scaling (llama3, linear, ours) in the frequency.
        """
        rank = self.size.head_dim
        stock = self.theta ** -(torch.arange(0, rank, 2, dtype=torch.float64) / rank)
        factors = (stock / self.model.inverse_frequencies.double()).numpy()
        return None if np.abs(factors - 1).max() < NEGLIGIBLE else factors.astype(np.float32)

    def rotated_heads(self, tensor: str) -> int | None:
        """How many heads a query or key tensor has, None for all others."""
        family, module = self.model.family, tensor.rpartition(".")[0]
        if module.endswith(family.attention.query):
            return self.size.heads
        return self.size.kv_heads if module.endswith(family.attention.key) else None


def open_source(folder: Path) -> ExportSource:
    """Open a model folder for the GGUF exporter.

    Raises:
        InvalidRecipe: codes of `preflight.exports.gguf_refusals`.
        InvalidCheckpoint: `unsupported_architecture`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, layout = family_and_layout(config)
    for code, why in gguf_refusals(folder, config, family, layout, reduced_attention=False):
        raise InvalidRecipe(code, f"export gguf: {why}", "exports")
    architecture = architecture_for(family.name, layout)
    if architecture is None:
        raise AssertionError(family.name)  # it was refused above
    model = StreamedModel(folder, family)
    blocks, width = model.size.blocks, model.size.mlp_width
    widths = mlp_widths(config["block_configs"]) if layout == "nemotron" else (width,) * blocks
    source = ExportSource(model, config, architecture, widths)
    if source.rope_factors is not None and not architecture.rope_freqs:
        raise InvalidRecipe(
            "gguf_rotary", f"export gguf: llama.cpp's {architecture.name!r} turns by the stock frequencies only"
        )
    return source


def family_and_layout(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The table of an artifact or a stock model, and its layout, by its config.json."""
    if config.get("model_type") == MODEL_TYPE:
        return table("llama"), "nemotron"
    if "block_shapes" in config:
        return table(str(config["model_type"]).partition("_")[2]), "full"
    return resolve(config), "portable"
