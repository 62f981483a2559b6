"""The worker's main process carries no torch: what it forks is small, and CUDA is never touched before a fork."""

import subprocess
import sys


def test_the_celery_side_imports_no_torch() -> None:
    code = "import sys, workers.tasks; print([m for m in ('torch', 'transformers', 'compression') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"
