"""The demo on the real model, as `make demo` runs it, and what it says when it cannot."""

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.modepress.running_stack import environment

LAST_LINE = re.compile(
    r"DEMO OK perplexity=(\d+\.\d+)->(\d+\.\d+) parameters=(\d+)->(\d+) bytes=(\d+)->(\d+)",
)


def demo(home: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "modepress.demo"]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True)


@pytest.mark.servers
@pytest.mark.real_model
@pytest.mark.timeout(1500)
def test_from_nothing_to_chatting_with_a_compressed_smollm2(tmp_path: Path) -> None:
    result = demo(tmp_path / "home")
    assert result.returncode == 0, result.stderr
    match = LAST_LINE.fullmatch(result.stdout.splitlines()[-1])
    assert match is not None, result.stdout
    perplexity_before, perplexity_after = float(match[1]), float(match[2])
    assert perplexity_before < perplexity_after < 1.5 * perplexity_before
    for before, after in ((int(match[3]), int(match[4])), (int(match[5]), int(match[6]))):
        assert 0.8 < after / before < 0.87  # a fifth of the blocks, which are four fifths of the model
    assert result.stdout.count("you: ") == 2
    left = [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or ())]
    assert left == [], "everything is stopped"


def test_failure_is_one_line_and_a_status(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = demo(tmp_path / "file")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("DEMO FAILED: ")
