"""What stock transformers computes of a model folder, by its own kernels: perplexity on a text, and bytes on disk.

A report's perplexity is computed block by block in float32; this is what a user's process has, with the library's
kernels for codes. Windows are consecutive runs of tokens from the start of the text, without special tokens.

    python benchmarks/quantized.py FOLDER TEXT --windows 8 --length 2048 --dtype bfloat16
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compression.runtime  # noqa: F401 (registers layouts of our own)

SLICE = 256  # tokens whose logits are turned into probabilities at once


@torch.inference_mode()
def perplexity(folder: Path, text: Path, windows: int, length: int, dtype: torch.dtype) -> float:
    """exp of the mean negative log-likelihood of each window's tokens but its first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][: windows * length]
    tokens = torch.tensor(ids).reshape(windows, length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    total = 0.0
    for row in tokens:
        hidden = model.base_model(row[None]).last_hidden_state[0, :-1]
        for states, targets in zip(hidden.split(SLICE), row[1:].split(SLICE), strict=True):
            logits = model.lm_head(states).float()
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double())
    return float(torch.tensor(total / (windows * (length - 1)), dtype=torch.float64).exp())


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    started = time.process_time()
    found = perplexity(asked.folder, asked.text, asked.windows, asked.length, getattr(torch, asked.dtype))
    size = sum(file.stat().st_size for file in asked.folder.glob("*.safetensors"))
    facts = {"perplexity": round(found, 4), "bytes": size, "cpu_seconds": round(time.process_time() - started)}
    print(json.dumps({"folder": asked.folder.name, "dtype": asked.dtype, **facts}))


if __name__ == "__main__":
    main()
