"""ONNX graphs of one model: bytes, perplexity, and tokens a CPU second beside transformers in float32.

    python benchmarks/onnx_graphs.py MODEL_FOLDER TEXT WORK [float32 int8 int8-tensor int4]

Perplexity is over the first 8 windows of 2,048 tokens of TEXT, read 512 tokens at a time; decoding is one greedy
continuation of 32 tokens on one thread. A window that was measured before is read from WORK, so that a run may be cut.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from api_schemas.exports.onnx import OnnxExport
from compression.core.streamed_model import StreamedModel
from compression.core.text_rows import builtin_text
from compression.exporters.onnx.assemble import Assembly
from compression.exporters.onnx.choice import Forms, choose
from compression.exporters.onnx.export import perplexity
from compression.exporters.onnx.files import write_graph
from compression.exporters.onnx.sensitivity import measure
from compression.exporters.source import family_and_layout
from compression.runtime.onnx_session import open_session

WINDOWS, LENGTH, MEASURED, WRITTEN = 8, 2048, 1024, 32
PROMPT = "The capital of France is"


def main(folder: Path, text: Path, work: Path, names: list[str]) -> None:
    """Print one line for each form."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: WINDOWS * LENGTH])
    windows = windows.view(WINDOWS, LENGTH)
    prompt = tokenizer(PROMPT)["input_ids"]
    for name in names:
        out = work / name
        if not out.exists():
            write(folder, tokenizer, out, name)
        size = sum(path.stat().st_size for path in out.iterdir())
        print(f"{name}: {size} bytes, {decoded(out, prompt):.1f} tokens a CPU second", flush=True)
        print(f"{name}: perplexity {judged(out, windows, work / f'{name}.json'):.3f}", flush=True)
    print(f"transformers, float32: {stock(folder, prompt):.1f} tokens a CPU second")


def write(folder: Path, tokenizer: object, out: Path, name: str) -> None:
    """One graph, its forms chosen on Python's own prose at the default limit, without the search that may lower it."""
    weights, _, inputs = name.partition("-")
    export = OnnxExport(format="onnx", weights=weights, inputs=inputs or "block")  # type: ignore[arg-type]
    family, _ = family_and_layout(json.loads((folder / "config.json").read_text()))
    model, forms = StreamedModel(folder, family), Forms.of(export)
    losses = {}
    if weights != "float32":
        prose = tokenizer(builtin_text("calibration")[:200_000], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        losses = measure(model, torch.tensor(prose[:MEASURED])[None], forms.tried, forms.outer)
    choice = choose(model, forms, losses, export.max_error, export.max_error)
    partial = out.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    write_graph(Assembly(model).build(choice.codings), partial)
    partial.rename(out)
    print(f"{name}: {len(choice.reasons)} of {max(0, len(losses) - 1)} linears held with care")


def judged(out: Path, windows: torch.Tensor, record: Path) -> float:
    """Perplexity over all windows, each kept as soon as it is known."""
    known: list[float] = json.loads(record.read_text()) if record.exists() else []
    graph = open_session(out, threads=1)
    for window in windows[len(known) :]:
        known.append(math.log(perplexity(graph, window[None])))
        record.write_text(json.dumps(known))
    return math.exp(sum(known) / len(known))


def decoded(out: Path, prompt: list[int]) -> float:
    """Tokens a CPU second of one greedy continuation."""
    graph = open_session(out, threads=1)
    logits, past = graph.read(np.array([prompt]), first_logit=-1)
    start = time.process_time()
    for _ in range(WRITTEN):
        logits, past = graph.read(np.array([[int(logits[0, -1].argmax())]]), past, first_logit=-1)
    return WRITTEN / (time.process_time() - start)


def stock(folder: Path, prompt: list[int]) -> float:
    """The same by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, **settings)
    start = time.process_time()
    model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, **settings)
    return WRITTEN / (time.process_time() - start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] or ["float32", "int8", "int4"])
