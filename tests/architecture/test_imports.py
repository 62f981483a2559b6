"""The import contracts of pyproject.toml hold, and the front really starts without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAN = (
    "service.app",
    "modepress",
    "modepress.cli",
    "modepress.stack",
    "modepress.doctor",
    "job_store.jobs",
    "preflight.plans",
    "workers.app",
    "workers.tasks",
    "workers.supervisor",
)
HEAVY = ("torch", "transformers", "numpy", "compression", "PIL")


def test_import_contracts() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", LEAN)
def test_front_and_supervisor_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_client_brings_no_server_along() -> None:
    servers = ("sqlalchemy", "celery", "fastapi", "job_store", "service", "workers", "preflight")
    code = f"import sys, modepress; print([name for name in {servers!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
