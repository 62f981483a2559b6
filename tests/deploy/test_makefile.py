"""What a visitor types first: it says what there is, and in one line what is missing."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("help", "demo", "up", "test", "check", "fix", "bench")


def run(*command: str, **extra: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, capture_output=True, text=True)


def test_help_names_every_target() -> None:
    told = run("make").stdout
    for target in TARGETS:
        assert f"make {target} " in told


@pytest.mark.parametrize("target", ["demo", "up", "test", "check", "fix", "bench"])
def test_targets_are_known_without_running_them(target: str) -> None:
    assert run("make", "--dry-run", target).returncode == 0


def test_a_python_that_will_not_do_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run("bash", ".ci/find-python", PYTHON="/bin/false")
    assert result.returncode == 1
    assert "3.11" in result.stderr
    assert len(result.stderr.splitlines()) == 1

    (tmp_path / "python3").symlink_to("/bin/false")
    bash, env = "/bin/bash", {"PATH": str(tmp_path), "PYTHON": ""}
    nothing = subprocess.run([bash, str(ROOT / ".ci/find-python")], env=env, capture_output=True, text=True)
    assert nothing.returncode == 1
    assert "install one" in nothing.stderr
    assert len(nothing.stderr.splitlines()) == 1


def test_find_python_finds_one() -> None:
    found = run("bash", ".ci/find-python", PYTHON="")
    assert found.returncode == 0
    code = "import sys; print((3, 11) <= sys.version_info[:2] <= (3, 13))"
    assert run(found.stdout.strip(), "-c", code).stdout == "True\n"


def test_ci_calls_check_and_test() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in text
    assert text.index("make check") < text.index("make test")
