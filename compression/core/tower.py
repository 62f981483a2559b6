"""The vision tower's linears where the step gives them 8 bits: which modules they are in memory, and their codes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from compression.core.int8_rows import quantize_rows
from compression.core.tensors import read_tensor
from preflight.code_budget import numbered_tail
from preflight.composites import Placed
from preflight.safetensors_header import TensorEntry


def tower_others(folder: Path, placed: Placed, tower: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Linears of the tower, by their names in the class in memory, that are not among those on disk.

    Disk and memory agree in a path's end from its numbered layer on; what is not numbered stays as it is.

    Args:
        folder: the original's.
        placed: its parts.
        tower: the modules on disk that become codes.
    """
    whole = placed.composite
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    tails = {numbered_tail(path) for path in tower}
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and whole.part_of(f"{name}.") == "vision" and numbered_tail(name) not in tails
    )


def tower_tensors(name: str, entry: TensorEntry, tower: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """A tensor around the decoder as it is written: as codes where it is one of the tower's linears."""
    module = name.removesuffix(".weight")
    if module in tower and name.endswith(".weight"):
        yield from sorted(quantize_rows(read_tensor(entry)).tensors(module).items())
    else:
        yield name, read_tensor(entry)
