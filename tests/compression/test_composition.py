"""modegpt, then quantisation, in one job: durable in both steps, proven, and reported for each."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api_schemas.events import ProgressEvent
from api_schemas.recipe import Recipe
from api_schemas.reports import CompressionReport
from compression.core.protocols import Cancelled
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan
from tests.compression.test_pipeline import hashes, run
from tests.tiny_models import make_tiny_model

MODEGPT = {"method": "modegpt", "mode": "reference", "sparsity": 0.3, "round_to": 32}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}


def recipe(*steps: dict[str, Any], **evaluation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "steps": steps,
            "calibration": {"num_samples": 12, "sequence_length": 48},
            "evaluation": {"num_windows": 4, "sequence_length": 48, "generation_tokens": 0, **evaluation},
        }
    )


def model(folder: Path, kind: Any = "llama", **settings: Any) -> Path:
    return make_tiny_model(folder, kind, hidden=64, intermediate=160, **settings)


class StopIn:
    """A sink that cancels after a number of finished blocks of one stage, and remembers what it heard."""

    def __init__(self, stage: str, blocks: int) -> None:
        self.stage, self.left = stage, blocks
        self.events: list[ProgressEvent] = []

    def emit(self, event: ProgressEvent) -> None:
        self.events.append(event)
        if event.stage == self.stage and event.block is not None:
            self.left -= 1
            if self.left == 0:
                raise Cancelled


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors but rotary pairs, which say how a block is built."""
    return sum(
        entry.bytes for name, entry in open_checkpoint(folder).tensors.items() if not name.endswith("rotary_pairs")
    )


@pytest.mark.parametrize(
    ("layout", "tied"),
    [({"layout": "portable"}, True), ({"layout": "full", "modules": ["mlp", "query_key"]}, False)],
)
def test_both_steps_are_planned_made_proven_and_reported(tmp_path: Path, layout: dict, tied: bool) -> None:
    """T20, T27."""
    folder = model(tmp_path / "in", tied=tied)
    asked = recipe({**MODEGPT, **layout}, GPTQ, generation_tokens=3)
    plan = make_plan(open_checkpoint(folder), asked, model="tiny")
    sink = StopIn("none", 0)
    report = run(folder, tmp_path / "out", asked, sink=sink)
    assert plan.blockers == ()
    assert report.plan == plan
    assert [one.method for one in plan.steps] == ["modegpt", "gptq"]
    assert plan.steps[0].bytes_after == plan.steps[1].bytes_before > plan.steps[1].bytes_after == plan.bytes_after
    for planned, made in zip(plan.steps, report.steps, strict=True):
        assert (made.parameters.before, made.parameters.after) == (planned.parameters_before, planned.parameters_after)
        assert (made.bytes.before, made.bytes.after) == (planned.bytes_before, planned.bytes_after)
    assert stored_bytes(tmp_path / "out") == plan.bytes_after
    assert report.parameters.after == plan.parameters_after < report.parameters.before
    assert report.block_parameters.after == plan.block_parameters_after
    quantised = [part for row in report.blocks if row.step == 1 for part in row.modules]
    assert [part.bits for part in quantised] == [4] * 14
    assert all(0 < part.relative_output_error < 0.5 for part in quantised)
    assert [row.step for row in report.blocks] == [0, 0, 1, 1]
    assert report.reload.max_logit_difference <= report.reload.tolerance
    assert ("LlamaForCausalLM (stock" in report.reload.loader) == (layout["layout"] == "portable")
    said = [event.message for event in sink.events if event.stage == "quantizing" and event.block == 1]
    assert said[0].startswith("step 2 of 2, block 2 of 2")
    percents = [event.percent for event in sink.events if event.level == "info"]
    assert percents == sorted(percents)
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("cut", [("compressing", 3), ("quantizing", 2)])
def test_cut_between_or_inside_the_steps_then_resumed_is_the_undisturbed_artifact(
    tmp_path: Path, cut: tuple[str, int], undisturbed: tuple[Path, Path]
) -> None:
    """T25: after the last block of the first step, and after a block of the second."""
    folder, whole = undisturbed
    asked = recipe(MODEGPT, GPTQ)
    with pytest.raises(Cancelled):
        run(folder, tmp_path / "out", asked, sink=StopIn(*cut))
    assert not (tmp_path / "out").exists()
    again = StopIn("none", 0)
    run(folder, tmp_path / "out", asked, sink=again)
    assert hashes(tmp_path / "out") == hashes(whole)
    assert (tmp_path / "out/modepress.json").read_bytes() == (whole / "modepress.json").read_bytes()


@pytest.mark.parametrize("line", ["compressing: step 1 of 2, block 2 of 3", "quantizing: step 2 of 2, block 1 of 3"])
def test_killed_in_either_step_then_started_again_is_the_undisturbed_artifact(
    tmp_path: Path, line: str, undisturbed: tuple[Path, Path]
) -> None:
    """T25, with SIGKILL: a process that dies says nothing and tidies nothing."""
    folder, whole = undisturbed
    (tmp_path / "recipe.json").write_text(recipe(MODEGPT, GPTQ).model_dump_json())
    command = [sys.executable, "-m", "compression", str(folder), str(tmp_path / "out"), "--threads", "1"]
    command += ["--recipe", str(tmp_path / "recipe.json"), "--report", str(tmp_path / "report.json")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line in said for said in process.stderr)  # reads up to that line
        process.kill()
    assert not (tmp_path / "out").exists()
    finished = sorted(path.name for path in tmp_path.rglob("block-*.json"))
    assert finished
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(whole)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and the artifact of an undisturbed run."""
    place = tmp_path_factory.mktemp("undisturbed")
    folder = model(place / "in", "qwen2", layers=3)
    run(folder, place / "out", recipe(MODEGPT, GPTQ))
    return folder, place / "out"


def test_a_quantisation_alone_keeps_every_width(tmp_path: Path) -> None:
    folder = model(tmp_path / "in", tied=True)
    asked = recipe({"method": "round_to_nearest", "bits": 8, "group_size": None})
    report = run(folder, tmp_path / "out", asked)
    assert report.plan.modules == ()
    assert report.parameters.after == report.parameters.before
    assert report.steps[0].bytes.after == stored_bytes(tmp_path / "out") == report.plan.bytes_after
    assert [one.method for one in report.steps] == ["round_to_nearest"]
    assert report.divergence.mean_kl < 0.01


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([GPTQ, MODEGPT], r"put 'modegpt' before 'gptq'"),
        ([GPTQ, {"method": "round_to_nearest"}], r"two of one kind"),
        ([MODEGPT, MODEGPT], r"two of one kind"),
        ([MODEGPT, GPTQ, GPTQ], r"at most 2 items"),
        ([{"method": "awq"}], r"'awq' found using 'method' does not match any of the expected tags"),
    ],
)
def test_other_orders_are_refused_by_name(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(*steps)
