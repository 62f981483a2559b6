"""A target for perplexity: met on held-out text by the very model that is written; resumed; refused by name."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from api_schemas.errors import InvalidCalibration, InvalidRecipe, JobFailed
from api_schemas.reports import CompressionReport, SearchReport
from compression.core.protocols import Cancelled
from compression.core.streamed_model import StreamedModel
from compression.core.texts import load_windows
from compression.evaluation import final_states, mean_loss
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.plans import make_plan
from tests.compression.test_pipeline import StopAfter, hashes, recipe, run
from tests.tiny_models import make_tiny_model, teach


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(
        tmp_path_factory.mktemp("taught"), "llama", tied=True, hidden=64, intermediate=160, layers=3
    )
    teach(folder)
    return folder


def searching(increase: float, trials: int = 4, **step: Any) -> Any:
    target = {"perplexity_increase": increase, "trials": trials}
    return recipe({"sparsity": None, "target": target, "round_to": 4, **step})


def searched(report: CompressionReport) -> SearchReport:
    assert report.search is not None
    return report.search


def check_frontier(found: SearchReport, increase: float, trials: int) -> None:
    rows = found.frontier
    assert 1 <= len(rows) <= trials
    assert all(one.parameters > two.parameters for one, two in pairwise(rows))
    assert all(one.sparsity < two.sparsity for one, two in pairwise(rows))
    for row in rows:
        assert row.increase == pytest.approx(row.perplexity / found.perplexity_before - 1)
        assert row.within_target == (row.increase <= increase)
        assert row.predicted_perplexity > 0
    chosen = rows[found.chosen]
    assert chosen.within_target
    assert not any(row.within_target for row in rows[found.chosen + 1 :])


@pytest.mark.parametrize(
    "step",
    [
        {"layout": "portable"},
        {"layout": "full"},
        {"layout": "full", "mode": "reference", "allocation": "block_influence"},
    ],
)
def test_the_target_is_met_on_held_out_text_by_the_model_that_is_written(
    tmp_path: Path, taught: Path, step: dict[str, Any]
) -> None:
    asked = searching(0.15, **step)
    sink = StopAfter(-1)
    report = run(taught, tmp_path / "out", asked, sink=sink)
    found = searched(report)
    check_frontier(found, 0.15, 4)
    assert report.calibration.used == 12
    assert found.text.used == 3
    assert found.text.sha256 not in (report.calibration.sha256, report.evaluation.sha256)
    assert report.parameters.after == found.frontier[found.chosen].parameters
    assert report.plan.sparsity_requested is None
    assert ("price lists" in found.predicted_from) == (step == {"layout": "full"})
    percents = [event.percent for event in sink.events]
    assert percents == sorted(percents)
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report
    target = json.loads((tmp_path / "out" / "modepress.json").read_text())["recipe"]["steps"][0]["target"]
    assert (target["perplexity_increase"], target["trials"]) == (0.15, 4)
    kept = {path.parent.name for path in (tmp_path / "blocks").rglob("block-*.safetensors")}
    assert len(kept) == 1  # of all trials, the best one's blocks
    assert len(list((tmp_path / "blocks").rglob("trial.json"))) == len(found.frontier)
    # measured again from the files of the artifact, on the windows after the twelve of the calibration
    windows = text_after_calibration(taught, asked)
    written = StreamedModel(tmp_path / "out", resolve(open_checkpoint(taught).config))
    loss = mean_loss(written, final_states(written, windows, lambda _: None), windows)
    assert float(torch.tensor(loss).exp()) == pytest.approx(found.frontier[found.chosen].perplexity, rel=1e-4)


def text_after_calibration(folder: Path, asked: Any) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    more = {"files": {}, "roots": None, "hub_offline": True, "role": "calibration", "write_text": None}
    return load_windows(asked.calibration, 15, tokenizer, **more).tokens[12:]


def test_cancelled_in_its_second_trial_then_resumed_it_is_the_undisturbed_artifact(
    tmp_path: Path, taught: Path
) -> None:
    asked = searching(0.15)
    whole = searched(run(taught, tmp_path / "whole" / "out", asked))
    assert len(whole.frontier) >= 2
    with pytest.raises(Cancelled):
        run(taught, tmp_path / "cut" / "out", asked, sink=StopAfter(3 + 2))
    made = sorted(path.parent.name for path in (tmp_path / "cut").rglob("trial.json"))
    assert len(made) == 1
    again = searched(run(taught, tmp_path / "cut" / "out", asked))
    assert hashes(tmp_path / "cut" / "out") == hashes(tmp_path / "whole" / "out")
    assert again.model_copy(update={"frontier": ()}) == whole.model_copy(update={"frontier": ()})
    for one, two in zip(again.frontier, whole.frontier, strict=True):
        assert one.model_copy(update={"seconds": 0.0}) == two.model_copy(update={"seconds": 0.0})


def test_with_a_quantisation_the_target_holds_for_both_steps_together(tmp_path: Path, taught: Path) -> None:
    steps = [
        {"method": "modegpt", "round_to": 8, "target": {"perplexity_increase": 0.2, "trials": 2}},
        {"method": "round_to_nearest", "bits": 8, "group_size": None},
    ]
    asked = recipe().model_copy(update={"steps": type(recipe()).model_validate({"steps": steps}).steps})
    report = run(taught, tmp_path / "out", asked)
    found = searched(report)
    check_frontier(found, 0.2, 2)
    assert report.bytes.after < report.bytes.before
    assert {path.parent.name for path in (tmp_path / "blocks").rglob("block-*.safetensors")} >= {"quantized"}


def test_what_no_trial_reaches_fails_with_the_least_that_was_seen(tmp_path: Path, taught: Path) -> None:
    with pytest.raises(JobFailed) as caught:
        run(taught, tmp_path / "out", searching(1e-7, trials=2, mode="reference"))
    assert (caught.value.code, caught.value.param) == (
        "target_not_reached",
        "recipe.steps.0.target.perplexity_increase",
    )
    assert "raised perplexity from" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_target_that_everything_meets_takes_all_that_can_go(tmp_path: Path, taught: Path) -> None:
    found = searched(run(taught, tmp_path / "out", searching(100.0, sparsity_cap=0.3)))
    assert "nothing more can be removed" in found.ended
    assert found.frontier[found.chosen].sparsity == pytest.approx(0.3, abs=0.03)


def test_one_window_of_text_is_too_short_for_a_search(tmp_path: Path, taught: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    asked = searching(0.1).model_dump(mode="json")
    asked["calibration"] = {"source": "file", "path": str(text), "num_samples": 4, "sequence_length": 48}
    with pytest.raises(InvalidCalibration) as caught:
        run(taught, tmp_path / "out", type(searching(0.1)).model_validate(asked))
    assert caught.value.code == "search_text_too_short"


def test_the_plan_says_what_it_cannot_know_and_bounds_the_rest(taught: Path) -> None:
    checkpoint = open_checkpoint(taught)
    searching_plan = make_plan(checkpoint, searching(0.1, trials=4), model="tiny")
    plain = make_plan(checkpoint, recipe({"round_to": 4}), model="tiny")
    assert searching_plan.blockers == ()
    assert searching_plan.sparsity_requested is None
    assert not searching_plan.shapes_final
    assert any("at most 4 trials" in note for note in searching_plan.notes)
    assert searching_plan.parameters_after == searching_plan.parameters_before
    assert searching_plan.flops > 3 * plain.flops
    assert searching_plan.disk_bytes > plain.disk_bytes
    assert searching_plan.peak_memory_bytes >= plain.peak_memory_bytes


def test_where_not_even_one_step_can_go_the_plan_refuses(taught: Path, tmp_path: Path) -> None:
    asked = searching(0.1, sparsity_cap=0.01, round_to=64)
    with pytest.raises(InvalidRecipe) as caught:
        run(taught, tmp_path / "out", asked)
    assert caught.value.code == "target_unreachable"
