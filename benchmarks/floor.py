"""What calibrating and compressing cost, in dense forward passes over the same tokens, all measured in one run.

    python benchmarks/floor.py MODEL [--windows 8] [--length 2048] [--sparsity 0.3] [--threads N] [--clock processor]

The floor is one pass of all blocks over the calibration tokens in float32 (embeddings in, no head). Then modes
`reference` and `refined`, layout `full`: everything between the texts and the last durable block; no export, no
evaluation. Text is Python's documentation, repeated where it has fewer windows. Prints a line of JSON.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from smollm2 import machine

from api_schemas.recipe import Recipe
from compression.core.block_store import FolderBlockStore
from compression.core.blockwise import compress_blocks, run_block_
from compression.core.protocols import NullSink
from compression.planning import choose_method, choose_walker
from compression.prepare import Prepared, prepare
from compression.stages import Stages

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}


def ready_for(model: Path, mode: str, asked: argparse.Namespace, folder: Path) -> tuple[Recipe, Prepared]:
    """The recipe and everything before its first block, with exactly as many windows as asked for."""
    recipe = Recipe.model_validate(
        {
            "steps": [{"method": "modegpt", "mode": mode, "layout": "full", "sparsity": asked.sparsity}],
            "calibration": {
                "source": "builtin",
                "num_samples": asked.windows,
                "sequence_length": asked.length,
                "forward": asked.forward,
            },
            "evaluation": {"source": "builtin", "num_windows": 1, "sequence_length": 64, "generation_tokens": 0},
        }
    )
    ready = prepare(recipe, model, folder / "unused", model.name, files={}, roots=None, hub_offline=True)
    tokens = ready.calibration.tokens
    tokens = tokens.repeat(-(-asked.windows // len(tokens)), 1)[: asked.windows]
    return recipe, dataclasses.replace(ready, calibration=dataclasses.replace(ready.calibration, tokens=tokens))


@torch.inference_mode()
def dense_seconds(ready: Prepared, clock: Clock) -> float:
    """One pass of the original's blocks over the calibration tokens, weights read on the way."""
    started = clock()
    hidden = ready.model.embed(ready.calibration.tokens)
    for index in range(ready.model.blocks):
        run_block_(ready.model, ready.model.block(index, ready.model.block_state(index)), index, hidden)
    return clock() - started


def compress_seconds(recipe: Recipe, ready: Prepared, folder: Path, clock: Clock) -> tuple[float, float]:
    """Calibration that comes before the walk, and the walk."""
    store, stages = FolderBlockStore(folder), Stages(NullSink())
    started = clock()
    with ready.model.products_in(recipe.calibration.forward):
        method = choose_method(recipe, ready, store, stages)
        chosen = clock()
        for _ in compress_blocks(ready.model, choose_walker(recipe, ready, method, store), store):
            continue
    return chosen - started, clock() - chosen


def main() -> None:
    """Measure the three, the floor before and after the others, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("model", type=Path, help="a checkpoint, e.g. SmolLM2-135M-Instruct")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--forward", choices=("float32", "bfloat16"), default="float32", help="of the calibration")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="processor: where others work beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = CLOCKS[asked.clock]
    row: dict[str, object] = {"machine": machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    row |= {"windows": asked.windows, "length": asked.length, "threads": asked.threads}
    row |= {"forward": asked.forward, "clock": asked.clock}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipes = {mode: ready_for(asked.model, mode, asked, folder) for mode in ("reference", "refined")}
        floor = [dense_seconds(recipes["reference"][1], clock)]
        took = {mode: compress_seconds(*both, folder / mode, clock) for mode, both in recipes.items()}
        floor.append(dense_seconds(recipes["reference"][1], clock))
    dense = sum(floor) / len(floor)
    row["dense_seconds"] = [round(one, 2) for one in floor]
    for mode, (before, walk) in took.items():
        row[mode] = {"before_the_walk": round(before, 2), "walk": round(walk, 2)}
        row[f"{mode}_in_dense_passes"] = round((before + walk) / dense, 2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
