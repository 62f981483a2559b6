"""Compressing tiny models without files around it: what most tests of the science need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from compression.core.blockwise import OneStream, compress_blocks
from compression.core.protocols import BlockResult
from compression.core.streamed_model import StreamedModel
from compression.core.unwritten_model import NarrowedModel
from compression.methods.modegpt import Modegpt
from compression.reload import logits_of
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.shapes import shapes_for


class MemoryBlockStore:
    """Blocks in a dictionary."""

    def __init__(self) -> None:
        self.results: dict[int, BlockResult] = {}

    def get(self, index: int) -> BlockResult | None:
        return self.results.get(index)

    def put(self, result: BlockResult) -> None:
        self.results[result.index] = result


@dataclass
class Walk:
    """A compressed tiny model, before it is written."""

    model: StreamedModel
    method: Modegpt
    store: MemoryBlockStore
    reports: list[Any]
    config: dict[str, Any]
    tokens: torch.Tensor


def step(**settings: Any) -> ModegptConfig:
    defaults = {"method": "modegpt", "mode": "reference", "sparsity": 0.3, "round_to": 1}
    return ModegptConfig.model_validate({**defaults, **settings})


def random_tokens(windows: int, length: int, vocabulary: int = 384, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))


def walk(
    folder: Path,
    config: ModegptConfig,
    tokens: torch.Tensor,
    *,
    shapes: Sequence[BlockShape] | None = None,
    shared_pairs: torch.Tensor | None = None,
    store: MemoryBlockStore | None = None,
) -> Walk:
    checkpoint = open_checkpoint(folder).decoder
    family = resolve(checkpoint.config)
    size = family.dimensions(checkpoint.config)
    model = StreamedModel(folder, family, checkpoint.tensors)
    chosen = shapes if shapes is not None else shapes_for(family, checkpoint.config, config)
    method = Modegpt(config, family, size, chosen, shared_pairs)
    kept = store if store is not None else MemoryBlockStore()
    hidden = model.embed(tokens)
    walker = OneStream(model, method, size, hidden, propagation=config.propagation)
    reports = list(compress_blocks(model, walker, kept))
    return Walk(model, method, kept, reports, dict(checkpoint.config), tokens)


def expected_logits(
    model: StreamedModel, method: Modegpt, store: MemoryBlockStore, tokens: torch.Tensor
) -> torch.Tensor:
    return logits_of(NarrowedModel(model, method, store), tokens)
