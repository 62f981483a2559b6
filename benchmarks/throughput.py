"""Tokens per second of a dense model and of its narrower versions, in the inference process's own code.

    python benchmarks/throughput.py CHECKPOINT [--sparsity 0.2 0.3 0.5] [--repeats 3] [--prompt 128] [--new 16]

Speed does not depend on the weights' values: each narrow model has the widths that a plan in mode `reference` gives it
and random weights in the checkpoint's own type. The engine answers one request at a time; batch 8 is measured on the
model and cache that it loads, called with eight rows. All models take turns within a repeat, so that a busy machine
slows them alike; medians, and ratios to dense. Appends a JSON line per run to benchmarks/throughput.jsonl.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from smollm2 import machine
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import compression.runtime  # noqa: F401 (registers the classes of layout `full`)
from api_schemas.recipe import Recipe
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan
from workers.inference.loading import LoadedModel, load, plan_load
from workers.inference.registry import ModelSource

RESULTS = Path(__file__).with_suffix(".jsonl")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def narrow(checkpoint: Path, layout: str, sparsity: float, folder: Path) -> tuple[int, int, int]:
    """Write a random model of the planned widths; returns those of block 0."""
    step = {"method": "modegpt", "mode": "reference", "layout": layout, "sparsity": sparsity}
    plan = make_plan(open_checkpoint(checkpoint), Recipe.model_validate({"steps": [step]}), model=checkpoint.name)
    shape = plan.blocks[0]
    settings = json.loads((checkpoint / "config.json").read_text())
    if layout == "portable":
        settings["intermediate_size"] = shape.mlp_width
    else:
        settings["model_type"] = f"modepress_{settings['model_type']}"
        settings["block_shapes"] = [block.model_dump() for block in plan.blocks]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    model.save_pretrained(folder)
    for file in checkpoint.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return shape.mlp_width, shape.query_key_rank, shape.value_output_rank


@torch.inference_mode()
def speeds(loaded: LoadedModel, batch: int, prompt: int, new: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Prompt tokens and new tokens per second, as `workers.inference.generation` reads and writes them."""
    cache = DynamicCache(config=loaded.model.config)
    inputs: dict[str, Any] = {loaded.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
    ids = torch.randint(3, loaded.vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    started = clock()
    logits = loaded.model(input_ids=ids, **inputs).logits
    read = clock() - started
    started = clock()
    for _ in range(new):
        logits = loaded.model(input_ids=logits[:, -1:].argmax(dim=-1), **inputs).logits
    return batch * prompt / read, batch * new / (clock() - started)


def main() -> None:
    """Build, load, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a Llama in bfloat16")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3, 0.5])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: steadier on a busy machine")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = {"dense": _loaded(asked.checkpoint)}
        widths: dict[str, tuple[int, int, int] | None] = {"dense": None}
        for sparsity in asked.sparsity:
            for layout in ("portable", "full"):
                name = f"{layout} {sparsity:.0%}"
                widths[name] = narrow(asked.checkpoint, layout, sparsity, Path(scratch) / name)
                models[name] = _loaded(Path(scratch) / name)
        for batch in asked.batch:
            load_before = os.getloadavg()[0]
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for repeat in range(asked.repeats + 1):
                for name, model in models.items():
                    measured = speeds(model, batch, asked.prompt, asked.new, CLOCKS[asked.clock])
                    if repeat:  # the first warms up
                        taken[name].append(measured)
            _report(batch, taken, widths, (load_before, os.getloadavg()[0]), asked)


def _loaded(folder: Path) -> LoadedModel:
    return load(plan_load(ModelSource(id=folder.name, folder=folder, created_at=0.0)))


def _report(
    batch: int,
    taken: dict[str, list[tuple[float, float]]],
    widths: dict[str, tuple[int, int, int] | None],
    loads: tuple[float, float],
    asked: argparse.Namespace,
) -> None:
    print(
        f"batch {batch}, {asked.prompt} prompt and {asked.new} new tokens, load average {loads[0]:.1f}-{loads[1]:.1f}"
    )
    medians = {n: [statistics.median(column) for column in zip(*rows, strict=True)] for n, rows in taken.items()}
    for name, (prefill, decode) in medians.items():
        ratios = [one / dense for one, dense in zip((prefill, decode), medians["dense"], strict=True)]
        print(f"  {name:13s} prefill {prefill:8.1f} ({ratios[0]:.2f}x)  decode {decode:7.2f} ({ratios[1]:.2f}x)")
        row = {"model": asked.checkpoint.name, "version": name, "widths": widths[name], "batch": batch}
        row |= {"prompt": asked.prompt, "new": asked.new, "prefill": prefill, "decode": decode, "runs": taken[name]}
        row |= {"clock": asked.clock, "load": loads, "threads": torch.get_num_threads(), "torch": torch.__version__}
        with RESULTS.open("a") as results:
            results.write(json.dumps({**row, "date": time.strftime("%Y-%m-%d"), "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
