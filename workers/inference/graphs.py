"""ONNX graphs of models: loaded with onnxruntime in the place of weights, and read token by token.

onnxruntime is imported when the first graph is loaded.
"""

import time
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig

import compression.runtime  # noqa: F401  (registers the layouts of compressed models with transformers)
from api_schemas.errors import InvalidCheckpoint, Unavailable
from preflight.engines import GRAPH_FILE, graph_folder
from workers.inference.registry import ModelSource

if TYPE_CHECKING:
    from compression.runtime.onnx_session import OnnxModel


@dataclass(frozen=True)
class ServedGraph:
    """A graph in memory, with the configuration of the model that it was made of.

    Attributes:
        config: transformers' configuration.
        graph: the graph in onnxruntime.
        eos_ids: what the generation config or the configuration names as ends of an answer; may be None.
        bytes: of its files, which is what its tensors occupy.
        seconds: that loading took.
    """

    config: Any
    graph: "OnnxModel"
    eos_ids: int | list[int] | None
    bytes: int
    seconds: float


def graph_bytes(source: ModelSource) -> int:
    """Bytes of the files of a source's graph.

    Raises:
        InvalidCheckpoint: `model_load_failed`: they are gone.
    """
    try:
        return sum(path.stat().st_size for path in _folder(source).iterdir())
    except OSError as error:
        raise _broken(source, error) from error


def load_graph(source: ModelSource) -> ServedGraph:
    """Load the graph of a source that names one.

    Raises:
        InvalidCheckpoint: `model_load_failed`.
        Unavailable: `out_of_memory`.
    """
    from compression.runtime.onnx_session import open_session

    start = time.monotonic()
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        graph = open_session(_folder(source), torch.get_num_threads())
    except MemoryError as error:
        message = f"no memory left to load '{source.id}' for {source.engine}; unload others or use a smaller one"
        raise Unavailable("out_of_memory", message, "model") from error
    except Exception as error:  # onnxruntime names no common base for what a damaged file can raise
        raise _broken(source, error) from error
    eos = getattr(config, "eos_token_id", None)
    if (source.folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(source.folder, local_files_only=True).eos_token_id or eos
    return ServedGraph(config, graph, eos, graph_bytes(source), time.monotonic() - start)


class GraphDecoder:
    """A graph with the cache of one answer."""

    def __init__(self, served: ServedGraph) -> None:
        self._graph = served.graph
        self._past: list[np.ndarray] | None = None

    def read(self, tokens: list[int], pictures: object = None) -> torch.Tensor:
        """Append tokens and return the logits [vocabulary] after the last of them; there are no pictures."""
        del pictures  # a model that sees has no graph
        logits, self._past = self._graph.read(np.array([tokens], dtype=np.int64), self._past, first_logit=-1)
        return torch.from_numpy(logits[0, -1])

    def copy(self) -> "GraphDecoder":
        """Return a decoder that goes on from the same place; the arrays are shared, since each read makes new ones."""
        return copy(self)


def _folder(source: ModelSource) -> Path:
    return graph_folder(source.folder, source.engine)


def _broken(source: ModelSource, error: Exception) -> InvalidCheckpoint:
    message = f"{GRAPH_FILE} of '{source.id}' cannot be loaded for {source.engine}: {type(error).__name__}: {error}"
    return InvalidCheckpoint("model_load_failed", message, "engine")
