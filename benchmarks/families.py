"""Both modes on a small trained model of every family: `PYTHONPATH=. python benchmarks/families.py [FAMILY …]`.

Each model has 4 blocks and 32 channels and is trained for a moment on Python's help texts. Printed is the mean KL, in
nats per token, of the compressed model's predictions from the original's on other help texts, with 40 % of the blocks'
parameters removed, layout full, the same widths in all blocks: mode reference, refined with `refit` local, refined.
"""

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from api_schemas.methods.modegpt import ModegptConfig
from compression.core.blockwise import OneStream, compress_blocks, run_block_
from compression.core.protocols import BlockResult, Walker
from compression.core.streamed_model import StreamedModel
from compression.methods.modegpt import Modegpt
from compression.methods.modegpt_refined import TwoStreams
from preflight.checkpoint import open_checkpoint
from preflight.families import known_families, resolve
from preflight.shapes import shapes_for
from tests.tiny_models import make_tiny_model, teach

ROWS = {
    "reference": {"mode": "reference"},
    "local": {"metric": "plain", "refit": "local"},
    "refined": {"metric": "plain"},
}
LAYERS = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2}}
LENGTH, CALIBRATION, EVALUATION = 64, 256, 64  # tokens, windows, windows


class Kept:
    """Finished blocks in memory."""

    def __init__(self) -> None:
        self.results: dict[int, BlockResult] = {}

    def get(self, index: int) -> BlockResult | None:
        """A finished block, or None."""
        return self.results.get(index)

    def put(self, result: BlockResult) -> None:
        """Keep a finished block."""
        self.results[result.index] = result


def windows(folder: Path, first: int, count: int) -> Tensor:
    """`[count, LENGTH]` tokens of the help texts from topic `first` on."""
    text = "\n".join(list(topics.values())[first : first + 40])
    ids = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@torch.inference_mode()
def mean_kl(model: StreamedModel, method: Modegpt, kept: Kept, tokens: Tensor) -> float:
    """Of the compressed model from the original."""
    x, y = model.embed(tokens), model.embed(tokens)
    for index, shape in enumerate(method.shapes):
        run_block_(model, model.block(index, model.block_state(index)), index, x)
        state = kept.results[index].state
        run_block_(model, model.resized_block(index, state, shape.model_dump(), method.scaling(index)), index, y)
    with model.head() as head:
        p, q = (head(stream.flatten(0, 1)).log_softmax(dim=-1) for stream in (x, y))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def measure(folder: Path, **settings: Any) -> float:
    """Compress one model and judge it."""
    fixed = {"method": "modegpt", "sparsity": 0.4, "layout": "full", "allocation": "uniform", "round_to": 1}
    config = ModegptConfig.model_validate({**fixed, **settings})
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    model, size = StreamedModel(folder, family, checkpoint.tensors), family.dimensions(checkpoint.config)
    method, kept = Modegpt(config, family, size, shapes_for(family, checkpoint.config, config)), Kept()
    hidden = model.embed(windows(folder, 0, CALIBRATION))
    walker: Walker = (
        OneStream(model, method, size, hidden, propagation="sequential")
        if config.mode == "reference"
        else TwoStreams(model, method, hidden, lambda _: None)
    )
    for _ in compress_blocks(model, walker, kept):
        pass
    return mean_kl(model, method, kept, windows(folder, 60, EVALUATION))


def main() -> None:
    """Print a row per family."""
    print("family", *ROWS, sep="\t")
    for kind in sys.argv[1:] or known_families():
        with tempfile.TemporaryDirectory() as folder:
            path = make_tiny_model(Path(folder), kind, layers=4, intermediate=96, **LAYERS.get(kind, {}))
            torch.manual_seed(0)
            teach(path)
            print(kind, *(f"{measure(path, **settings):.4f}" for settings in ROWS.values()), sep="\t", flush=True)


if __name__ == "__main__":
    main()
