"""`modepress import`: originals to a folder here, in a process with torch; what is wrong in one line."""

import json
from pathlib import Path

import pytest

from modepress.cli import run
from modepress.exit_codes import ExitCode
from tests.compression.importers.tinygptv_originals import write_originals


def words(folder: Path) -> list[str]:
    """The command for tiny originals, which it writes."""
    originals = write_originals(folder)
    paths = [word for role, path in originals.paths.items() for word in (f"--{role.replace('_', '-')}", str(path))]
    settings = [word for key, value in originals.options.items() for word in ("--set", f"{key}={value}")]
    return ["import", "tinygptv", *paths, *settings]


def test_a_folder_here_and_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = words(tmp_path)
    assert run([*command, "--to", str(tmp_path / "model"), "--json"]) == ExitCode.OK
    said = json.loads(capsys.readouterr().out)
    assert said["importer"] == "tinygptv"
    assert {"optimizer_state", "adapters_merged", "text_branch"} <= {one["what"] for one in said["savings"]}
    assert said["bytes"]["written"] < said["bytes"]["read"]
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert run([*command, "--to", str(tmp_path / "model")]) == ExitCode.REFUSED
    assert "target_exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ([], "either --name"),
        (["--name", "n", "--to", "x"], "either --name"),
        (["--to", "x", "--set", "stage"], "NAME=VALUE"),
        (["--to", "x", "--set", "stage=7"], "stage"),
        (["--to", "x", "--set", "depth=7"], "depth"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(more: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    roles = ["--language", "l", "--vision", "v", "--q-former", "q", "--delta", "d"]
    assert run(["import", "tinygptv", *roles, *more]) == ExitCode.USAGE
    assert word in capsys.readouterr().err
