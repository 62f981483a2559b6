"""Peak memory of a compression beside what its plan predicts, on random Llama-shaped checkpoints in bfloat16.

    python benchmarks/memory.py --shape 7B [--blocks 2] [--mode reference] [--sparsity 0.8] [--folder DIR]

The checkpoint is written a block at a time, so this process stays small too; it and everything else that the run makes
is deleted afterwards. The weights are noise: the run measures memory and time and says nothing of quality. Appends a
JSON line per run to benchmarks/memory.jsonl, with machine and date.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from smollm2 import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from api_schemas.recipe import Recipe
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan

RESULTS = Path(__file__).with_suffix(".jsonl")
VOCABULARY = 32000
# hidden, MLP width, blocks, heads, key/value heads: TinyLlama, Llama 3.2's 3B and Llama 2's 7B in all but vocabulary
SHAPES = {
    "tiny": (256, 704, 4, 4, 2),
    "1B": (2048, 5632, 22, 32, 4),
    "3B": (3072, 8192, 28, 24, 8),
    "7B": (4096, 11008, 32, 32, 32),
}
GIB = 1024**3


def write_checkpoint(folder: Path, shape: tuple[int, int, int, int, int], *, vocabulary: int = VOCABULARY) -> None:
    """Write a random Llama of this shape, one shard per block, each forgotten before the next."""
    hidden, width, blocks, heads, kv_heads = shape
    size, channels = hidden // heads, hidden // heads * kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (channels, hidden),
        "self_attn.v_proj": (channels, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    places: dict[str, str] = {}
    total = 0
    generator = torch.Generator().manual_seed(0)
    for block in range(blocks + 1):
        shard: dict[str, torch.Tensor] = {}
        if block == blocks:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                shard[name] = _noise((vocabulary, hidden), generator)
            shard["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        else:
            prefix = f"model.layers.{block}."
            for name, dimensions in linears.items():
                shard[f"{prefix}{name}.weight"] = _noise(dimensions, generator)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{block + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes: any text can be encoded, and its size fits every vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _noise(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(0.0, 1 / math.sqrt(shape[1]), generator=generator)


class Watch:
    """Resident bytes of a process and its children, sampled; the largest of each stage."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Start sampling."""
        self.stage = "starting"
        self.largest: dict[str, int] = {}
        self.children: dict[str, int] = {}
        self._process = psutil.Process(process.pid)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while True:
            try:
                own = self._process.memory_info().rss
                children = sum(child.memory_info().rss for child in self._process.children(recursive=True))
            except psutil.NoSuchProcess:
                if not self._process.is_running():
                    return
                continue  # only a child has ended
            self.largest[self.stage] = max(self.largest.get(self.stage, 0), own)
            self.children[self.stage] = max(self.children.get(self.stage, 0), children)
            time.sleep(0.2)


def measure(source: Path, recipe: dict[str, object], scratch: Path, quiet: bool) -> dict[str, object]:
    """Run one compression in a process of its own and return what it needed, by stage."""
    plan = make_plan(open_checkpoint(source), Recipe.model_validate(recipe), model=source.name)
    asked, report = scratch / "recipe.json", scratch / "report.json"
    asked.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "compression", str(source), str(scratch / "small")]
    command += ["--recipe", str(asked), "--report", str(report)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    watch = Watch(process)
    assert process.stderr is not None
    for line in process.stderr:
        if "%  " in line:
            watch.stage = line.split("%", 1)[1].split(":", 1)[0].strip()
        if not quiet or "%  " not in line:
            sys.stderr.write(f"{time.perf_counter() - started:7.0f} s {line}")
    if process.wait():
        raise SystemExit(f"the compression ended with status {process.returncode}")
    facts = json.loads(report.read_text())
    states = facts["calibration"]["tokens_used"] * json.loads((source / "config.json").read_text())["hidden_size"] * 4
    return {
        "predicted_bytes": plan.peak_memory_bytes,
        "peak_bytes": facts["peak_rss_bytes"],
        "hidden_state_bytes": states,
        "stage_of_peak": max(watch.largest, key=lambda stage: watch.largest[stage]),
        "by_stage": watch.largest,
        "children_by_stage": {stage: size for stage, size in watch.children.items() if size},
        "seconds": facts["seconds"],
        "stage_seconds": facts["stage_seconds"],
        "reload": facts["reload"]["loader"],
        "logit_difference": facts["reload"]["max_logit_difference"],
    }


def main() -> None:
    """Write a checkpoint, compress it, print prediction and measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1B")
    parser.add_argument("--blocks", type=int, help="depth; default is the shape's own")
    parser.add_argument("--mode", choices=("reference", "refined"), default="reference")
    parser.add_argument("--layout", choices=("portable", "full"), default="portable")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--modules", nargs="*", help="parts to reduce; default is the layout's")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--folder", type=Path, help="where to work; default is the system's temporary folder")
    parser.add_argument("--quiet", action="store_true")
    asked = parser.parse_args()
    hidden, width, blocks, heads, kv_heads = SHAPES[asked.shape]
    blocks = asked.blocks or blocks
    step = {"method": "modegpt", "mode": asked.mode, "layout": asked.layout, "sparsity": asked.sparsity}
    step |= {"allocation": asked.allocation}
    if asked.modules:
        step["modules"] = asked.modules
    recipe = {
        "steps": [step],
        "calibration": {"source": "builtin", "num_samples": asked.windows, "sequence_length": asked.length},
        "evaluation": {"source": "builtin", "num_windows": 2, "sequence_length": asked.length, "generation_tokens": 0},
    }
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="modepress-memory-") as temporary:
        source = Path(temporary) / f"random-{asked.shape}"
        write_checkpoint(source, (hidden, width, blocks, heads, kv_heads))
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        row = measure(source, recipe, Path(temporary), asked.quiet)
    row = {"shape": asked.shape, "blocks": blocks, "step": step, "stored_bytes": stored, **row}
    row |= {"tokens": asked.windows * asked.length, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    with RESULTS.open("a") as results:
        results.write(json.dumps(row) + "\n")
    above = row["peak_bytes"] - row["hidden_state_bytes"]
    print(
        f"{asked.shape} {blocks} blocks {asked.mode} {stored / 1e9:.1f} GB stored: peak {row['peak_bytes'] / GIB:.2f} "
        f"GiB in {row['stage_of_peak']} ({above / GIB:.2f} above the hidden states), predicted "
        f"{row['predicted_bytes'] / GIB:.2f} ({row['predicted_bytes'] / row['peak_bytes'] - 1:+.1%}), "
        f"{row['seconds']:.0f} s"
    )
    print("  " + ", ".join(f"{stage} {size / GIB:.2f}" for stage, size in row["by_stage"].items()))
    print("  other processes: " + ", ".join(f"{s} {size / GIB:.2f}" for s, size in row["children_by_stage"].items()))


if __name__ == "__main__":
    main()
