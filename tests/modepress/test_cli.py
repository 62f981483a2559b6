"""The command line as scripts see it: JSON on stdout, exit statuses, words on stderr."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modepress import Client
from modepress.exit_codes import ExitCode
from tests.modepress.recipes import small_recipe
from tests.modepress.running_stack import RunningStack, environment
from tests.tiny_models import RUINOUS_STEP, make_tiny_model, teach
from tests.tiny_vision_models import make_tiny_vision_model, picture

pytestmark = pytest.mark.servers


@dataclass
class Shell:
    """Runs `modepress` next to a stack."""

    home: Path
    folder: Path

    def run(self, *arguments: str, stdin: str = "", **extra: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "modepress", *arguments],
            env=environment(self.home, extra),
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def json(self, *arguments: str, status: int = 0, **extra: str) -> Any:
        """Run with --json; stdout must be one JSON document and nothing else."""
        result = self.run(*arguments, "--json", **extra)
        assert result.returncode == status, result.stderr
        assert "Traceback" not in result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def shell(stack: RunningStack, tmp_path: Path) -> Shell:
    return Shell(stack.home, tmp_path)


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(small_recipe()))
    return str(path)


def test_models_as_table_and_as_json(shell: Shell, tiny: str) -> None:
    assert tiny in shell.run("models").stdout
    assert tiny in [model["id"] for model in shell.json("models")]
    assert shell.json("model", tiny)["facts"]["blocks"] == 2


def test_plan(shell: Shell, tiny: str, recipe_file: str) -> None:
    assert shell.json("plan", tiny, "--recipe", recipe_file)["model"] == tiny
    told = shell.run("plan", tiny, "--sparsity", "0.3", "--layout", "full")
    assert told.returncode == 0
    assert "bytes of weights" in told.stdout
    exported = ("plan", tiny, "--recipe", recipe_file, "--export", "gguf:f32", "--export", "gguf")
    assert "llama-server" in str(shell.json(*exported)["runtimes"])
    refused = shell.run("plan", tiny, "--recipe", recipe_file, "--export", "vllm")
    assert refused.returncode == ExitCode.REFUSED
    assert "vllm_layout" in refused.stdout
    assert "exports.0" in shell.run("plan", tiny, "--recipe", recipe_file, "--export", "gguf:q3").stderr


def test_plan_for_a_target_says_the_sparsity_and_replaces_the_recipes_own(
    shell: Shell, tiny: str, recipe_file: str
) -> None:
    whole = shell.json("model", tiny)["facts"]["parameters"]
    target = ("--target-parameters", str(whole - 1000))
    plan = shell.json("plan", tiny, "--recipe", recipe_file, *target)
    assert plan["parameters_after"] <= whole - 1000
    assert f"follows from target.parameters {whole - 1000}" in shell.run("plan", tiny, *target).stdout
    refused = shell.run("plan", tiny, "--target-bytes", "8 GB")
    assert refused.returncode == 3
    assert "target_already_met" in refused.stdout


def test_compress_report_events_and_chat(shell: Shell, tiny: str, recipe_file: str) -> None:
    done = shell.json("compress", tiny, "--recipe", recipe_file, "--suffix", "cli", "--metadata", "a=b", "--seed", "3")
    job, report = done["job"], done["report"]
    assert (job["status"], job["seed"], job["metadata"]) == ("succeeded", 3, {"a": "b"})
    assert shell.json("report", job["id"]) == report
    table = shell.run("report", job["id"]).stdout
    assert "perplexity" in table
    assert f"{report['perplexity']['after']:.3f}" in table

    lines = shell.run("events", job["id"], "--json").stdout.splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    followed = shell.run("events", job["id"], "--follow")
    assert followed.returncode == 0
    assert len(followed.stdout.splitlines()) == len(lines)

    beat = shell.json("status", job["id"])["heartbeat"]
    assert (beat["attempt"], beat["child_alive"]) == (1, False)
    assert "heartbeat " in shell.run("watch", job["id"]).stdout
    traced = shell.json("trace", job["id"], "--into", "trace.json")
    document = json.loads((shell.folder / "trace.json").read_text())
    assert len(document["traceEvents"]) == traced["events"] > 20
    assert report["time"]["attempts"] == 1
    assert "effective job time rate" in table
    (worker,) = shell.json("workers")
    assert (worker["alive"], worker["standing"]) == (True, "unchecked")
    assert "MODEPRESS_SELF_CHECK" in shell.run("workers").stdout
    assert shell.json("doctor", job["id"])["findings"] == []
    assert "nothing is wrong with it" in shell.run("doctor", job["id"]).stdout

    assert job["id"] in [one["id"] for one in shell.json("jobs", "--metadata", "a=b")]
    assert shell.json("job", job["id"])["compressed_model"] == job["compressed_model"]
    assert job["id"] in shell.run("jobs").stdout

    said = ("What is the capital of France?", "--max-tokens", "5")
    answer = shell.json("chat", job["compressed_model"], *said)
    text = answer["text"].replace("\r\n", "\n").replace("\r", "\n") + "\n"  # as a pipe read in text mode gives it
    assert shell.run("chat", job["compressed_model"], *said).stdout == text
    piped = shell.run("chat", job["compressed_model"], "--max-tokens", "5", stdin=said[0])
    assert piped.stdout == text
    assert shell.json("delete", job["compressed_model"])["deleted"] is True


def test_chat_with_images(shell: Shell, client: Client, tmp_path: Path) -> None:
    model = client.push(make_tiny_vision_model(tmp_path / "eyes")).id
    for name, seed in (("one.png", 1), ("two.jpg", 2)):
        picture(seed).save(tmp_path / name)
    asked = ("chat", model, "What is this?", "--max-tokens", "8")
    texts = [
        shell.json(*asked, *(word for name in names for word in ("--image", name)))["text"]
        for names in ((), ("one.png",), ("two.jpg",), ("one.png", "two.jpg"), ("two.jpg", "one.png"))
    ]
    assert len(set(texts)) == len(texts)
    (tmp_path / "no.png").write_text("no picture")
    for name, code in (("gone.png", "image_unreadable"), ("no.png", "image_format_not_supported")):
        refused = shell.run(*asked, "--image", name, "--json")
        assert refused.returncode == ExitCode.REFUSED
        assert json.loads(refused.stderr)["error"]["code"] == code


def test_a_search_is_planned_made_and_its_frontier_printed(shell: Shell, client: Client, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "searched", intermediate=96)
    teach(folder)
    recipe_file = tmp_path / "small.json"
    recipe_file.write_text(json.dumps(small_recipe()))
    model = client.push(folder).id
    asked = ("--recipe", str(recipe_file), "--max-perplexity-increase", "0.2", "--trials", "2")
    planned = shell.run("plan", model, *asked)
    assert planned.returncode == 0, planned.stderr
    assert "not known before the trials" in planned.stdout
    done = shell.json("compress", model, *asked)
    search = done["report"]["search"]
    assert search["frontier"][search["chosen"]]["increase"] <= 0.2
    assert done["job"]["compressed_model"].startswith("searched-modegpt-ppl20pct-portable-")
    table = shell.run("report", done["job"]["id"]).stdout
    assert "target: perplexity at most +20.0%" in table
    assert f"{search['frontier'][0]['perplexity']:.3f}" in table


def test_a_failed_gate_ends_with_5_and_keeps_the_report(shell: Shell, client: Client, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "taught")
    teach(folder)
    recipe_file = tmp_path / "ruinous.json"
    recipe_file.write_text(json.dumps(small_recipe(steps=[RUINOUS_STEP])))
    model = client.push(folder).id
    done = shell.json("compress", model, "--recipe", str(recipe_file), "--gate", "0.02", status=5)
    assert done["job"]["error"]["code"] == "quality_gate"
    assert done["report"]["gate_passed"] is False


def test_a_failed_job_ends_with_4(shell: Shell, tiny: str, recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too few words.")
    done = shell.json("compress", tiny, "--recipe", recipe_file, "--calibration", "short.txt", status=4)
    assert done["job"]["status"] == "failed"
    assert done["report"] is None
    followed = shell.run("events", done["job"]["id"], "--follow")
    assert followed.returncode == 4
    (found,) = shell.json("doctor", done["job"]["id"], status=4)["findings"]
    assert "was refused" in found["what"]
    assert shell.json("watch", done["job"]["id"], status=4)["status"] == "failed"
    assert any(done["job"]["id"] in line for line in shell.json("doctor")["failed_jobs"])


def test_no_wait_then_cancel(shell: Shell, tiny: str, recipe_file: str) -> None:
    job = shell.json("compress", tiny, "--recipe", recipe_file, "--num-samples", "500", "--no-wait")
    assert job["status"] == "queued"
    assert shell.json("cancel", job["id"])["status"] in {"cancelling", "cancelled"}
    assert shell.run("events", job["id"], "--follow").returncode == 4


def test_a_refusal_ends_with_3_and_says_why_in_json_on_stderr(shell: Shell) -> None:
    result = shell.run("model", "nobody", "--json")
    assert (result.returncode, result.stdout) == (3, "")
    assert json.loads(result.stderr)["error"]["code"] == "model_not_found"
    words = shell.run("report", "no-such-job")
    assert words.returncode == 3
    assert words.stderr.startswith("error: ")
    assert len(words.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["plan", "x"],
        ["plan", "x", "--sparsity", "0.99"],
        ["plan", "x", "--recipe", "missing.json"],
        ["plan", "x", "--sparsity", "0.2", "--target-bytes", "8 GB"],
        ["plan", "x", "--target-bytes", "8 gigs"],
        ["plan", "x", "--target-bytes", "8 GB", "--max-perplexity-increase", "0.1"],
        ["plan", "x", "--target-bytes", "8 GB", "--trials", "3"],
        ["push"],
        ["compress", "x", "--sparsity", "0.2", "--calibration", "no-such-file"],
        ["compress", "x", "--sparsity", "0.2", "--metadata", "no-equals-sign"],
    ],
)
def test_usage_errors_end_with_2(shell: Shell, arguments: list[str]) -> None:
    result = shell.run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_unreachable_ends_with_6(shell: Shell) -> None:
    result = shell.run("models", MODEPRESS_URL="http://127.0.0.1:9")
    assert result.returncode == 6
    assert "modepress up" in result.stderr


def test_push_tells_what_it_leaves_at_home(shell: Shell, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-pickle"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "optimizer.pt").write_bytes(b"pickle")
    result = shell.run("push", str(folder), "--json")
    assert json.loads(result.stdout)["id"] == "with-pickle"
    assert "not sent: optimizer.pt" in result.stderr


def test_push_of_a_hub_id_without_network_fails_by_name(shell: Shell) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    result = shell.run("push", "--hub", "nobody/nothing", "--json", **offline)
    assert result.returncode == 3
    assert "Traceback" not in result.stderr


def test_keys_are_made_listed_and_revoked(shell: Shell) -> None:
    made = shell.json("keys", "create", "laptop")
    assert made["secret"].startswith("mp_")
    listed = shell.json("keys", "list")
    assert [key["name"] for key in listed if key["id"] == made["id"]] == ["laptop"]
    assert made["secret"] not in json.dumps(listed)
    assert shell.json("keys", "revoke", made["id"])["revoked_at"] is not None
    assert shell.run("keys", "revoke", "key_nobody").returncode == 3
    made = shell.json("keys", "create", "x", "--scope", "read", "--scope", "infer", "--owner", "anna")
    assert (made["scopes"], made["owner"]) == (["infer", "read"], "anna")
    assert shell.run("keys", "create", "x", "--scope", "write").returncode == 2
    assert shell.run("keys", "create", "x", "--owner", "An na").returncode == 3


def test_doctor(shell: Shell) -> None:
    found = shell.json("doctor")
    assert found["problems"] == []
    assert found["stack"]["alive"] is True
    assert found["torch"]["threads"] >= 1
    assert found["redis"]["version"]
    assert "data folder" in shell.run("doctor").stdout
