"""The operator's commands: gc, backup, restore, quotas and audit, as one uses them."""

import json
from pathlib import Path

import pytest

from modepress.cli import run
from modepress.exit_codes import ExitCode


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODEPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MODEPRESS_DATABASE_URL", raising=False)
    return tmp_path / "home"


def test_from_quota_to_restore(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> object:
        capsys.readouterr()
        assert run([*words, "--json"]) == ExitCode.OK
        return json.loads(capsys.readouterr().out)

    key = said("keys", "create", "laptop", "--owner", "anna", "--per-minute", "5")
    assert isinstance(key, dict)
    assert key["requests_per_minute"] == 5
    state = said("quotas", "set", "anna", "--bytes", "5G", "--jobs", "2")
    assert isinstance(state, dict)
    assert state["limits"] == {"bytes": 5 * 10**9, "jobs": 2, "tokens": None}
    assert said("quotas", "show") == [state]
    assert run(["quotas", "set", "anna", "--jobs", "two", "--json"]) == ExitCode.REFUSED
    assert json.loads(capsys.readouterr().err)["error"]["param"] == "jobs"

    (home / "tmp").mkdir(exist_ok=True)
    stray = home / "blobs" / "ab" / ("ab" * 32)
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"stray")
    listed = said("gc", "--dry-run")
    assert stray.exists()
    assert said("gc") == listed == [{"kind": "blob", "what": "ab" * 32, "bytes": 5, "why": "no file has these bytes"}]
    assert not stray.exists()
    assert run(["gc"]) == ExitCode.OK
    assert "nothing to remove" in capsys.readouterr().out

    facts = said("backup", str(tmp_path / "backup"))
    assert run(["backup", str(tmp_path / "backup")]) == ExitCode.REFUSED
    monkeypatch.setenv("MODEPRESS_HOME", str(tmp_path / "new"))
    assert said("restore", str(tmp_path / "backup")) == facts
    lines = said("audit")
    assert isinstance(lines, list)
    told = [(line["action"], line["owner"]) for line in lines]
    assert told == [("restore", "server"), ("gc", "server"), ("quotas set", "anna"), ("keys create", "anna")]
    assert all(line["actor"].startswith("cli:") for line in lines)
    assert run(["restore", str(tmp_path / "backup")]) == ExitCode.REFUSED
    assert "not_empty" in capsys.readouterr().err
