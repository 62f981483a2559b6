"""The whole compression on tiny models: report, gate, resume, refusals, determinism, nothing half-made."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from api_schemas.errors import InsufficientStorage, InvalidRecipe, ModepressError
from api_schemas.events import ProgressEvent
from api_schemas.recipe import Recipe
from api_schemas.reports import CompressionReport
from compression.core.protocols import Cancelled, NullSink
from compression.judgement import GateFailed
from compression.pipeline import compress
from modepress.report_table import report_table
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan
from tests.tiny_models import RUINOUS_STEP, make_tiny_model, teach

PARTS = ("mlp", "query_key", "value_output")


def recipe(step: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "steps": [{"method": "modegpt", "sparsity": 0.3, "round_to": 1, **(step or {})}],
            "calibration": {"num_samples": 12, "sequence_length": 48},
            "evaluation": {"num_windows": 4, "sequence_length": 48, "generation_tokens": 0},
            **settings,
        }
    )


def run(
    folder: Path, target: Path, asked: Recipe, *, sink: Any = None, blocks: Path | None = None
) -> CompressionReport:
    return compress(
        asked,
        folder,
        target,
        model="tiny",
        blocks=blocks or target.parent / "blocks",
        progress=sink or NullSink(),
        files={},
        roots=None,
        hub_offline=True,
    )


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "modepress.json").read_text())["files"]


class StopAfter:
    """A sink that cancels after a number of finished blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks
        self.events: list[ProgressEvent] = []

    def emit(self, event: ProgressEvent) -> None:
        self.events.append(event)
        if event.stage == "compressing" and event.block is not None:
            self.left -= 1
            if self.left == 0:
                raise Cancelled


@pytest.mark.parametrize("layout", ["portable", "full"])
def test_report_is_complete_and_matches_plan_and_artifact(tmp_path: Path, layout: str) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", tied=True, hidden=64, intermediate=160, layers=3)
    asked = recipe({"layout": layout}, evaluation={"num_windows": 4, "sequence_length": 48, "generation_tokens": 4})
    plan = make_plan(open_checkpoint(folder), asked, model="tiny")
    sink = StopAfter(-1)
    report = run(folder, tmp_path / "out", asked, sink=sink)
    written = open_checkpoint(tmp_path / "out").tensors
    floats = {name: entry for name, entry in written.items() if entry.dtype != "I64"}
    assert report.plan == plan
    # 12 windows of 48 tokens are one chunk: too few to choose ridges, which the report's reader is told
    assert [warning for warning in report.warnings if "mlp in 3 of 3 blocks: ridge 0.3, not chosen" in warning]
    assert report.parameters.after == sum(entry.parameters for entry in floats.values())
    assert report.block_parameters.before == plan.block_parameters_before
    assert report.block_parameters.after / report.block_parameters.before == pytest.approx(0.7, abs=0.005)
    stored = sum(entry.bytes for entry in floats.values())
    if plan.shapes_final:  # T20: then the plan is exact
        assert (report.parameters.after, report.shapes) == (plan.parameters_after, plan.blocks)
        assert stored == plan.bytes_after
    assert stored == pytest.approx(plan.bytes_after, rel=0.02)
    assert [(shape.mlp_width, shape.query_key_rank, shape.value_output_rank) for shape in report.shapes] == [
        tuple({module.module: module.width_after for module in row.modules}[part] for part in PARTS)
        for row in report.blocks
    ]
    assert [row.block for row in report.blocks] == [0, 1, 2]
    assert report.calibration.tokens_used == 12 * 48
    assert report.tokens_per_second.after is not None
    assert report.reload.max_logit_difference <= report.reload.tolerance
    percents = [event.percent for event in sink.events if event.level == "info"]
    assert percents == sorted(percents)
    assert percents[-1] == 100.0
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report


def test_a_model_that_does_not_fit_is_proven_but_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    monkeypatch.setattr("compression.reload.available_bytes", lambda: 1000)
    asked = recipe(evaluation={"num_windows": 4, "sequence_length": 48, "generation_tokens": 4})
    report = run(folder, tmp_path / "out", asked)
    assert report.reload.max_logit_difference <= report.reload.tolerance
    for pair in (report.tokens_per_second, report.peak_memory_bytes):
        assert (pair.before, pair.after) == (None, None)
        assert pair.reason is not None
        assert pair.reason.startswith("before: to generate it needs ")
        assert "after: to generate it needs " in pair.reason


@pytest.mark.parametrize("layout", ["portable", "full"])
def test_cancelled_after_a_block_then_resumed_is_the_undisturbed_artifact(tmp_path: Path, layout: str) -> None:
    """T25, T22: block influence and shared rotary pairs included, which a resumed run must not choose anew."""
    step = {"layout": layout, "modules": ["mlp", "query_key", "value_output"]}
    if layout == "full":
        step["allocation"] = "block_influence"
    folder = make_tiny_model(tmp_path / "in", "qwen2", layers=4)
    asked = recipe(step)
    run(folder, tmp_path / "whole" / "out", asked)
    with pytest.raises(Cancelled):
        run(folder, tmp_path / "cut" / "out", asked, sink=StopAfter(2))
    assert not (tmp_path / "cut" / "out").exists()
    run(folder, tmp_path / "cut" / "out", asked)
    assert hashes(tmp_path / "cut" / "out") == hashes(tmp_path / "whole" / "out")
    assert (tmp_path / "cut/out/modepress.json").read_bytes() == (tmp_path / "whole/out/modepress.json").read_bytes()


@pytest.mark.parametrize(
    "step",
    [
        {"layout": "portable", "target": {"bytes": "700 kB"}},
        {"layout": "full", "target": {"bytes": "700 kB"}},
        {"layout": "full", "mode": "reference", "allocation": "block_influence", "target": {"parameters": 170_000}},
    ],
)
def test_the_artifact_of_a_target_is_no_larger_on_disk(tmp_path: Path, step: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", tied=True, hidden=64, intermediate=288, layers=3)
    report = run(folder, tmp_path / "out", recipe({"sparsity": None, "round_to": 8, **step}))
    limit = report.recipe.steps[0].target.limit
    reached = report.bytes.after if "bytes" in step["target"] else report.parameters.after
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == report.bytes.after
    assert 0.97 * limit < reached <= limit


def test_a_damaged_finished_block_is_solved_again(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    run(folder, tmp_path / "a" / "out", recipe())
    for damaged in (tmp_path / "a" / "blocks").rglob("block-00000.safetensors"):
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 0xFF
        damaged.write_bytes(content)
    (tmp_path / "a" / "out").rename(tmp_path / "a" / "first")
    run(folder, tmp_path / "a" / "out", recipe())
    assert hashes(tmp_path / "a" / "out") == hashes(tmp_path / "a" / "first")


def test_another_recipe_never_picks_up_foreign_blocks(tmp_path: Path) -> None:
    """T25: same blocks folder, other sparsity."""
    folder = make_tiny_model(tmp_path / "in", "llama")
    run(folder, tmp_path / "one", recipe(), blocks=tmp_path / "blocks")
    run(folder, tmp_path / "two", recipe({"sparsity": 0.4}), blocks=tmp_path / "blocks")
    run(folder, tmp_path / "fresh", recipe({"sparsity": 0.4}), blocks=tmp_path / "elsewhere")
    assert hashes(tmp_path / "two") == hashes(tmp_path / "fresh") != hashes(tmp_path / "one")


@pytest.mark.parametrize("steps", [[{"method": "gptq", "group_size": 32, "bits": 4}], None])
def test_calibration_in_bfloat16_is_another_result_and_nearly_as_good(tmp_path: Path, steps: Any) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=160)
    teach(folder)
    asked = [
        recipe(
            calibration={"num_samples": 64, "sequence_length": 48, "forward": dtype},
            **({"steps": steps} if steps else {}),
        )
        for dtype in ("float32", "bfloat16")
    ]
    exact, rough = (run(folder, tmp_path / str(at) / "out", one) for at, one in enumerate(asked))
    assert hashes(tmp_path / "0" / "out") != hashes(tmp_path / "1" / "out")
    assert rough.perplexity.before == exact.perplexity.before  # judged in float32, whatever was calibrated in
    assert rough.perplexity.after == pytest.approx(exact.perplexity.after, rel=0.02)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report_table(rough))
    assert "with products in bfloat16, judged on" in captured.get()


def test_the_callers_random_generator_is_untouched(tmp_path: Path) -> None:
    """T22, also when the model writes its own calibration text."""
    folder = make_tiny_model(tmp_path / "in", "llama")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    run(folder, tmp_path / "a" / "out", recipe(calibration={"source": "self", "num_samples": 2, "sequence_length": 32}))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    run(folder, tmp_path / "b" / "out", recipe(calibration={"source": "self", "num_samples": 2, "sequence_length": 32}))
    assert hashes(tmp_path / "a" / "out") == hashes(tmp_path / "b" / "out")


def test_the_gate_fails_the_job_and_keeps_artifact_and_numbers(tmp_path: Path) -> None:
    """T31."""
    folder = make_tiny_model(tmp_path / "in", "llama", layers=3)
    teach(folder)
    asked = recipe(RUINOUS_STEP, gate={"perplexity_increase": 0.02})
    with pytest.raises(GateFailed) as caught:
        run(folder, tmp_path / "out", asked)
    assert caught.value.code == "quality_gate"
    assert caught.value.report.gate_passed is False
    assert caught.value.report.perplexity.after > caught.value.report.perplexity.before
    assert (tmp_path / "out" / "config.json").exists()


def test_fewer_windows_than_asked_are_reported(tmp_path: Path) -> None:
    """T18."""
    folder = make_tiny_model(tmp_path / "in", "llama")
    text = tmp_path / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    asked = recipe(calibration={"source": "file", "path": str(text), "num_samples": 128, "sequence_length": 48})
    report = run(folder, tmp_path / "out", asked)
    assert report.calibration.requested == 128
    assert 0 < report.calibration.used < 128
    assert any("128 windows asked for" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ({"layout": "portable", "modules": ["query_key"]}, "portable_needs_both"),
        ({"layout": "full", "modules": ["value_output"], "sparsity": 0.79}, "sparsity_impossible"),
        ({"sparsity": None, "target": {"bytes": "10 kB"}}, "target_unreachable"),
        ({"sparsity": None, "target": {"bytes": "8 GB"}}, "target_already_met"),
    ],
)
def test_blockers_refuse_before_anything_is_computed(tmp_path: Path, step: dict[str, Any], code: str) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    with pytest.raises(InvalidRecipe) as caught:
        run(folder, tmp_path / "out", recipe(step))
    assert caught.value.code == code
    assert not (tmp_path / "blocks").exists()
    assert not (tmp_path / "out").exists()


def test_evaluation_text_may_not_be_the_calibration_text(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    where = {"source": "file", "path": str(text), "sequence_length": 48}
    asked = recipe(
        calibration={**where, "num_samples": 4}, evaluation={**where, "num_windows": 4, "generation_tokens": 0}
    )
    with pytest.raises(ModepressError) as caught:
        run(folder, tmp_path / "out", asked)
    assert caught.value.code == "evaluation_is_calibration"


def test_a_disk_that_cannot_hold_the_job_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("compression.prepare.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InsufficientStorage) as caught:
        run(folder, tmp_path / "out", recipe())
    assert caught.value.code == "disk_full"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compression", *arguments], capture_output=True, text=True, check=False
    )


def test_command_line(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    (tmp_path / "recipe.json").write_text(recipe().model_dump_json())
    arguments = [str(folder), str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.json")]
    arguments += ["--report", str(tmp_path / "report.json"), "--threads", "1"]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    report = CompressionReport.model_validate_json((tmp_path / "report.json").read_text())
    assert report.perplexity.after > 1
    assert report.peak_rss_bytes <= report.plan.peak_memory_bytes  # T20: the estimate is a bound
    again = command(*arguments)
    assert again.returncode == 2
    assert json.loads(again.stderr.splitlines()[-1])["error"]["code"] == "target_exists"


def test_command_line_names_a_wrong_field(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"steps": [{"method": "modegpt", "sparsity": 1.5}]}')
    done = command(
        str(tmp_path), str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.json"), "--report", "unused"
    )
    assert done.returncode == 2
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["param"] == "recipe.steps.0.sparsity"
    assert "1.5" in error["message"]
