"""What llama.cpp computes with GGUF files of tiny random models: each architecture, layout and rotary form we write.

    python benchmarks/tiny_runtimes.py WORK --probe PROBE         PROBE is benchmarks/llama_cpp_probe.cpp, built

Each case is compressed as a job would, exported in float32, and compared with transformers in float32: logits of all
positions, 32 greedy tokens, and the ids of a text with contractions, numbers, spaces, other scripts and special tokens.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runtimes import GREEDY, compare
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from api_schemas.recipe import Recipe
from compression.core.protocols import NullSink
from compression.pipeline import compress
from preflight.gguf_rules import SPLITS
from tests.tiny_models import make_tiny_model

SIZES = {"hidden": 64, "intermediate": 160, "head_dim": 32, "layers": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ALL = {"modules": ["mlp", "query_key", "value_output"]}
CASES: tuple[tuple[str, str, dict[str, Any], dict[str, Any], str], ...] = (
    ("A0", "llama", {}, {}, "gpt-2"),
    ("A0, biases, tied", "llama", {"bias": True, "mlp_bias": True, "tied": True}, {}, "smollm"),
    ("A0, llama3 scaling", "llama", {"rope_parameters": LLAMA3}, {}, "llama-bpe"),
    ("A0, linear scaling", "llama", {"rope_parameters": LINEAR}, {}, "gpt-2"),
    ("A0", "mistral", {"sliding_window": None}, {}, "gpt-2"),
    ("A0", "qwen2", {"head_dim": 16}, {}, "qwen2"),
    ("A0", "qwen3", {}, {}, "qwen2"),
    ("A1", "llama", {}, ALL, "smollm"),
    ("A1, biases, llama3 scaling", "llama", {"bias": True, "rope_parameters": LLAMA3}, ALL, "gpt-2"),
    ("A1", "mistral", {"sliding_window": None}, ALL, "gpt-2"),
    ("A2: one block gone", "llama", {}, {"remove_blocks": 1}, "gpt-2"),
    ("nemotron", "llama", {}, {"layout": "nemotron", "allocation": "block_influence"}, "gpt-2"),
    ("nemotron, biases", "llama", {"bias": True, "mlp_bias": True}, {"layout": "nemotron"}, "gpt-2"),
)
TEXT = "The fox's 12345 jumps, isn't it?\n\n  Over 3 dogs —  naïve café 東京!\t<|im_start|>user\nHello<|im_end|>\n I'LL"


def splits(folder: Path, name: str) -> None:
    """Give a tiny tokenizer another way to split a text."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by_name = {ours: Regex(expression) for expression, ours in SPLITS.items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if name == "smollm":
        whole = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    elif name in by_name:
        whole = pre_tokenizers.Sequence([pre_tokenizers.Split(by_name[name], "isolated"), words])
    tokenizer.pre_tokenizer = whole
    tokenizer.model.ignore_merges = name == "llama-bpe"
    tokenizer.save(str(folder / "tokenizer.json"))


def run(work: Path, probe: Path, begin: int) -> None:
    """Compress, export, compare, print a row per case."""
    import compression.runtime  # noqa: F401 (layout nemotron has no stock class)

    print("| case | family | splits | architecture | largest logit difference | same 32 greedy tokens | same ids |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for number, (name, kind, settings, step, split) in list(enumerate(CASES))[begin:]:
        source, target = work / f"{number}-in", work / f"{number}-out"
        splits(make_tiny_model(source, kind, **{**SIZES, **settings}), split)
        recipe = Recipe.model_validate(
            {
                "steps": [{"method": "modegpt", "mode": "reference", "sparsity": 0.4, "round_to": 8, **step}],
                "calibration": {"num_samples": 8, "sequence_length": 48},
                "evaluation": {"num_windows": 2, "sequence_length": 48, "generation_tokens": 0},
                "exports": [{"format": "gguf", "dtype": "f32"}],
            }
        )
        report = compress(
            recipe,
            source,
            target,
            model=name,
            blocks=work / f"{number}-blocks",
            progress=NullSink(),
            files={},
            roots=None,
            hub_offline=True,
        )
        row = check(target, work, probe)
        print(
            f"| {name} | {kind} | {split} | {report.exports[0].architecture} | {row['difference']:.1e} "
            f"(spread {row['spread']:.1f}) | {row['greedy']} | {row['ids']} |",
            flush=True,
        )


def check(folder: Path, work: Path, probe: Path) -> dict[str, Any]:
    """Compare one artifact's float32 file with the artifact in transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = json.loads((folder / "exports" / "self_test.json").read_text())["tokens"][:64]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
        written = model.generate(
            torch.tensor([tokens]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    wanted = {"logits": logits.numpy(), "greedy": written[0, len(tokens) :].numpy()}
    files = {part: work / f"probe.{part}" for part in ("ids", "logits", "greedy", "text", "tokens")}
    np.array(tokens, np.int32).tofile(files["ids"])
    files["text"].write_text(TEXT, encoding="utf-8")
    command = [probe, folder / "exports" / "model-f32.gguf", files["ids"], files["logits"], files["greedy"], GREEDY]
    subprocess.run([str(word) for word in (*command, files["text"], files["tokens"])], check=True, capture_output=True)
    got = np.fromfile(files["logits"], np.float32).reshape(len(tokens), -1)
    ids = np.fromfile(files["tokens"], np.int32).tolist()
    row = compare(wanted, got, np.fromfile(files["greedy"], np.int32))
    return row | {"ids": ids == tokenizer(TEXT, add_special_tokens=False)["input_ids"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the case to begin with")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    run(asked.work, asked.probe, asked.first)
