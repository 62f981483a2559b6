"""Proof that an artifact loads: a fresh process reads it and its logits are compared with those computed in memory."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from api_schemas.errors import JobFailed
from api_schemas.reports import ReloadProof
from compression.core.blockwise import run_block_
from compression.core.memory import available_bytes
from compression.core.placement import placed_on
from compression.core.protocols import Streamed
from compression.core.timeline import span

PROBE = Path(__file__).with_name("probe.py")
PROJECT = Path(__file__).parents[1]
RUNNING_BYTES = 1024**3  # an interpreter, a cache of keys and values, and what a running model works in
RELATIVE_TOLERANCE = 1e-3  # of the largest logit: float32 rounding over tens of blocks, far below a wrong weight


@dataclass(frozen=True)
class Probed:
    """What a fresh process said of a model folder; its memory after generating, and after the logits too."""

    loader: str
    logits: Tensor | None
    tokens_per_second: float | None
    peak_memory_bytes: int
    proof_memory_bytes: int | None
    greedy_text: str


@torch.inference_mode()
def logits_of(model: Streamed, tokens: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` of one window `[1, tokens]`, block by block in float32."""
    with placed_on(model.device):
        hidden = model.embed(tokens)
        for index in range(model.blocks):
            run_block_(model, model.block(index, model.block_state(index)), index, hidden)
        with model.head() as head:
            logits: Tensor = head(hidden[0])
    return logits.cpu()


def too_large_to_run(folder: Path) -> str | None:
    """Why a model cannot be run whole on this machine now; None where it can.

    The proof needs one module in memory at a time; generating reads every weight for every token.
    """
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors")) + RUNNING_BYTES
    available = available_bytes()
    if needed <= available:
        return None
    return f"to generate it needs {needed} bytes of memory in its stored type, and {available} are available"


def run_probe(folder: Path, tokens: Tensor, *, generate: int, logits: bool, project_code: bool) -> Probed:
    """Load `folder` in a fresh, isolated process; without `generate` it holds one module's weights at a time.

    Args:
        folder: a model folder.
        tokens: `[1, n]` ids to run.
        generate: tokens to write greedily; 0 measures no speed.
        logits: whether to bring back logits in float32.
        project_code: whether the process may import `compression.runtime`.

    Raises:
        JobFailed: `reload_failed` with the last line of what the process said, or the keys that did not match.
    """
    with tempfile.TemporaryDirectory(prefix="modepress-probe-") as scratch:
        asked, out = Path(scratch) / "tokens.safetensors", Path(scratch) / "answer"
        save_file({"tokens": tokens.contiguous()}, asked)
        command = [sys.executable, "-I", str(PROBE), str(folder), str(asked), str(out)]
        command += ["--generate", str(generate), "--threads", str(torch.get_num_threads())]
        command += ["--logits"] if logits else []
        command += ["--project", str(PROJECT)] if project_code else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        with span("verify", "fresh process"):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise JobFailed("reload_failed", f"a fresh process could not load {folder.name}: {_reason(done.stderr)}")
        facts: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
        if facts["problems"]:
            raise JobFailed("reload_failed", f"{folder.name}: tensor names do not match: {facts['problems']}")
        return Probed(
            loader=facts["loader"],
            logits=load_file(out.with_suffix(".safetensors"))["logits"] if logits else None,
            tokens_per_second=facts.get("tokens_per_second"),
            peak_memory_bytes=facts["peak_memory_bytes"],
            proof_memory_bytes=facts.get("proof_memory_bytes"),
            greedy_text=facts.get("greedy_text", ""),
        )


def prove(probed: Probed, expected: Tensor, *, project_code: bool) -> ReloadProof:
    """Compare the fresh process's logits with the expected ones.

    Raises:
        JobFailed: `reload_mismatch` when they differ by more than float32 rounding explains, or are not finite.
    """
    assert probed.logits is not None  # noqa: S101 (the caller asked for them)
    tolerance = RELATIVE_TOLERANCE * max(1.0, float(expected.abs().max()))
    difference = float((probed.logits - expected).abs().max())
    if not difference <= tolerance:  # a NaN difference fails too
        raise JobFailed(
            "reload_mismatch",
            f"the reloaded artifact's logits differ by {difference:.3g} from those computed in memory "
            f"(tolerance {tolerance:.3g}); the artifact is not usable",
        )
    where = "with compression.runtime" if project_code else "stock transformers, without this project"
    return ReloadProof(
        max_logit_difference=difference,
        tolerance=tolerance,
        tokens=len(expected),
        loader=f"{probed.loader} ({where})",
        greedy_text=probed.greedy_text,
    )


def _reason(stderr: str) -> str:
    """The exception's own line of a traceback; its message may run on for more lines, which are left out."""
    raised = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt): .*$", stderr, flags=re.MULTILINE)
    lines = raised or stderr.strip().splitlines()
    return str(lines[-1]) if lines else "it said nothing"
