"""Ranks: the same chunks, the same result as one process, and an end by name when one of them is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from api_schemas.errors import InvalidRecipe, InvalidRequest
from api_schemas.recipe import Recipe
from api_schemas.reports import CompressionReport
from compression.core.parallel import Alone, joined, share_of
from compression.prepare import prepare
from tests.compression.test_pipeline import hashes, run
from tests.tiny_models import make_tiny_model

PATIENCE = 120  # seconds after which a test that waits has failed; nothing is measured by it
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}


@dataclass
class _Someone:
    rank: int
    size: int


@pytest.mark.parametrize("windows", [1, 5, 12, 13])
@pytest.mark.parametrize("per_chunk", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_whole_chunks_in_order(windows: int, per_chunk: int, size: int) -> None:
    every = list(range(windows))
    alone = [every[start : start + per_chunk] for start in range(0, windows, per_chunk)]
    found = []
    for rank in range(size):
        share = share_of(_Someone(rank, size), windows, per_chunk)
        assert share.first_chunk == len(found)  # so the chunk that judges is the same one
        own = every[share.windows]
        assert own or rank  # rank 0 measures on the first windows
        found += [own[start : start + per_chunk] for start in range(0, len(own), per_chunk)]
    assert found == alone


def recipe(*more: dict[str, Any], **step: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "steps": [{"method": "modegpt", "sparsity": 0.3, "round_to": 1, "layout": "full", **step}, *more],
            "calibration": {"num_samples": 250, "sequence_length": 48},  # six chunks, the last one shorter
            "evaluation": {"num_windows": 4, "sequence_length": 48, "generation_tokens": 0},
        }
    )


def command(folder: Path, out: Path, asked: Recipe) -> list[str]:
    out.mkdir()
    (out / "recipe.json").write_text(asked.model_dump_json())
    words = ["-m", "compression", folder, out / "model", "--recipe", out / "recipe.json", "--report", out / "r.json"]
    return [str(word) for word in words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize(
    "step",
    [
        {"mode": "reference", "allocation": "block_influence"},
        {"mode": "reference", "layout": "portable", "modules": ["mlp", "query_key", "value_output"]},
        {"mode": "refined"},
        {"mode": "refined", "family": "mixtral"},
        {
            "mode": "reference",
            "layout": "portable",
            "sparsity": 0.4,
            "round_to": 32,
            "remove_blocks": 1,
            "packed": True,
        },
    ],
    ids=["reference", "shared pairs", "refined", "refined experts", "blocks removed, then packed"],
)
def test_two_ranks_compress_as_one_process_does(tmp_path: Path, step: dict[str, Any]) -> None:
    step = dict(step)
    family, more = step.pop("family", "qwen2"), (GPTQ,) if step.pop("packed", False) else ()
    folder = make_tiny_model(tmp_path / "in", family, layers=3 if more else 2, hidden=64, intermediate=160)
    asked = recipe(*more, **step)
    run(folder, tmp_path / "one", asked)
    single = torch.get_num_threads()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, *command(folder, tmp_path / "two", asked)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    report = CompressionReport.model_validate_json((tmp_path / "two" / "r.json").read_text())
    assert report.ranks == 2
    assert report.calibration.used == 250
    facts = [json.loads((tmp_path / where / "modepress.json").read_text()) for where in ("one", "two/model")]
    assert facts[0]["blocks"] == facts[1]["blocks"]
    one, two = (load_file(tmp_path / where / "model.safetensors") for where in ("one", "two/model"))
    assert one.keys() == two.keys()
    exact = {name for name in one if torch.equal(one[name], two[name])}
    assert all(torch.equal(one[name], two[name]) for name in one if not one[name].is_floating_point())
    for name in one.keys() - exact:  # float32 weights: one unit in the last place, where threads are as many
        torch.testing.assert_close(two[name], one[name], rtol=1e-6 if single == 1 else 1e-3, atol=1e-6)
    if step["mode"] == "refined" and family == "qwen2":  # what was finished is taken up by all ranks
        (tmp_path / "two" / "model").rename(tmp_path / "two" / "first")
        again = subprocess.run([*start, *done.args[len(start) :]], capture_output=True, text=True, env=environment())
        assert again.returncode == 0, again.stderr
        assert "measured block" not in again.stderr
        assert hashes(tmp_path / "two" / "model") == hashes(tmp_path / "two" / "first")


def two_by_hand(*commands: list[str], timeout: str) -> list[subprocess.Popen[str]]:
    """Rank 0 and rank 1 without torchrun's agent, which would end the other one itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *words, "--rank-timeout", timeout],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(RANK=str(rank), **meeting),
        )
        for rank, words in enumerate(commands)
    ]


def error_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    _, said = process.communicate(timeout=PATIENCE)
    return json.loads(said.splitlines()[-1])["error"]


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, "600"), (signal.SIGSTOP, "4")])
def test_a_rank_that_is_killed_or_hangs_ends_the_other_by_name(tmp_path: Path, number: int, timeout: str) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", layers=3)
    words = command(folder, tmp_path / "out", recipe(mode="reference"))
    first, second = two_by_hand(words, words, timeout=timeout)
    try:
        assert "preparing" in first.stderr.readline()  # both have met
        second.send_signal(number)
        error = error_of(first)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 4
    assert error["code"] == "rank_lost"
    assert "rank 0 of 2" in error["message"]
    assert not (tmp_path / "out" / "model").exists()


def test_a_rank_that_was_asked_for_something_else_is_named_and_the_other_says_why(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", layers=3)
    words = [command(folder, tmp_path / f"out{n}", recipe(mode="reference", sparsity=n)) for n in (0.3, 0.4)]
    first, second = two_by_hand(*words, timeout="60")
    ours, theirs = error_of(first), error_of(second)
    assert theirs["code"] == "ranks_disagree"
    assert "recipe" in theirs["message"]
    assert ours["code"] == "rank_lost"
    assert theirs["message"] in ours["message"]
    assert (first.returncode, second.returncode) == (4, 4)


def test_more_ranks_than_chunks_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    asked = recipe().model_copy(update={"calibration": recipe().calibration.model_copy(update={"num_samples": 12})})
    words = command(folder, tmp_path / "out", asked)
    for process in two_by_hand(words, words, timeout="60"):
        error = error_of(process)
        assert process.returncode == 2
        assert error["code"] == "too_many_ranks"
        assert error["param"] == "recipe.calibration.num_samples"
        assert "start 1 ranks at most" in error["message"]


def test_an_environment_that_names_ranks_but_no_meeting_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequest, match="torchrun") as caught, joined(1.0):
        raise AssertionError("nobody met")
    assert (caught.value.code, caught.value.param) == ("ranks_unset", "WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(1.0) as group:
        assert isinstance(group, Alone)


def test_a_search_for_a_target_is_refused_to_several_ranks(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    asked = recipe(sparsity=None, target={"perplexity_increase": 0.5})
    with pytest.raises(InvalidRecipe, match="without torchrun") as caught:
        prepare(asked, folder, tmp_path / "out", "tiny", files={}, roots=None, hub_offline=True, group=_Someone(0, 2))
    assert caught.value.code == "ranks_cannot_search"
