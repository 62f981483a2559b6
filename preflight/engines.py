"""What a model folder can be answered from: its own weights, or an export that this service runs."""

from pathlib import Path
from typing import get_args

from api_schemas.inference import Engine

OWN: Engine = "transformers"
GRAPH_FILE = "model.onnx"


def engines_of(folder: Path) -> tuple[Engine, ...]:
    """The engines of a model folder: `transformers` first, then its ONNX graphs in the order of their names."""
    graphs = (name for name in sorted(get_args(Engine)) if name != OWN)
    return (OWN, *(name for name in graphs if graph_folder(folder, name).joinpath(GRAPH_FILE).is_file()))


def graph_folder(folder: Path, engine: str) -> Path:
    """Where an engine's graph lies."""
    return folder / "exports" / engine
