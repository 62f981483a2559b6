"""How tests break a model folder, and how they see what came of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from api_schemas.errors import InvalidCheckpoint
from preflight.checkpoint import describe, open_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refused(folder: Path) -> InvalidCheckpoint:
    with pytest.raises(InvalidCheckpoint) as caught:
        open_checkpoint(folder)
    return caught.value


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def blocker_codes(folder: Path) -> list[str]:
    return [blocker.code for blocker in describe(open_checkpoint(folder)).blockers]
