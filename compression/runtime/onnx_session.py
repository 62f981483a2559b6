"""An exported graph in onnxruntime: what the job measures with is what the server answers with.

onnxruntime is imported here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

IDS, LOGITS, FIRST_LOGIT = "input_ids", "logits", "first_logit"
GRAPH = "model.onnx"
DATA = "model.onnx.data"
FACTS = "export.json"


def past_names(layers: int) -> list[str]:
    """Names of the cache's inputs, keys before values, layer by layer."""
    return [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """Names of the cache's outputs, in the order of `past_names`."""
    return [f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


@dataclass(frozen=True)
class OnnxModel:
    """A loaded graph.

    Attributes:
        session: onnxruntime's.
        past: names of the cache's inputs.
        empty: a cache of no tokens for one text.
    """

    session: Any
    past: tuple[str, ...]
    empty: tuple[np.ndarray, ...]

    def read(
        self, tokens: np.ndarray, past: Sequence[np.ndarray] | None = None, first_logit: int = 0
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run the graph.

        Args:
            tokens: `[1, tokens]` int64.
            past: what an earlier call returned; None starts a text.
            first_logit: the first token whose logits are computed; −1 is the last alone.

        Returns:
            Logits `[1, kept, vocabulary]` and the cache after these tokens.
        """
        feeds = dict(zip(self.past, self.empty if past is None else past, strict=True))
        feeds |= {IDS: tokens, FIRST_LOGIT: np.array([first_logit], dtype=np.int64)}
        logits, *present = self.session.run(None, feeds)
        return logits, present


def open_session(folder: Path, threads: int) -> OnnxModel:
    """Load the graph of an export's folder.

    Args:
        folder: holds `model.onnx` and its data.
        threads: of onnxruntime; waiting threads sleep, they share the machine.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    inputs = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
    empty = tuple(np.zeros((1, one.shape[1], 0, one.shape[3]), dtype=np.float32) for one in inputs)
    return OnnxModel(session, tuple(one.name for one in inputs), empty)
