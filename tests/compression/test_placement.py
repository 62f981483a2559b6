"""Compressing on another device: nothing is left behind on the processor, and nothing comes out otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from api_schemas.errors import InvalidRequest
from api_schemas.recipe import Recipe
from compression.core.block_store import FolderBlockStore
from compression.core.placement import CPU, choose_device, named, placed_on
from compression.core.protocols import NullSink
from compression.evaluation import final_states, mean_loss
from compression.pipeline import compress
from compression.prepare import prepare
from compression.stages import Stages
from compression.steps import Made, run_steps
from tests.pretend_device import GPU, pretended
from tests.tiny_models import ModelType, make_tiny_model

REFERENCE = {"method": "modegpt", "sparsity": 0.3, "round_to": 4, "mode": "reference"}
REFINED = {"method": "modegpt", "sparsity": 0.3, "round_to": 4, "mode": "refined", "layout": "full"}
SHARED = {**REFERENCE, "sparsity": 0.5, "modules": ["mlp", "query_key", "value_output"], "remove_blocks": 1}
BY_INFLUENCE = {**REFERENCE, "layout": "full", "allocation": "block_influence", "propagation": "dense"}
GPTQ = {"method": "gptq", "bits": 8, "group_size": None}


def recipe(*steps: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "steps": steps,
            "calibration": {"num_samples": 12, "sequence_length": 48},
            "evaluation": {"num_windows": 4, "sequence_length": 48, "generation_tokens": 0},
        }
    )


def made(folder: Path, scratch: Path, asked: Recipe, device: torch.device) -> tuple[Made, float]:
    """What the recipe's steps make, and its loss."""
    scratch.mkdir()
    ready = prepare(asked, folder, scratch / "t", "tiny", files={}, roots=None, hub_offline=True, device=device)
    with placed_on(device):
        done = run_steps(asked, ready, FolderBlockStore(scratch / "blocks"), Stages(NullSink()))
        states = final_states(done.model, ready.evaluation.tokens, lambda _: None)
        return done, mean_loss(done.model, states, ready.evaluation.tokens)


@pytest.mark.parametrize(
    ("model_type", "steps"),
    [
        ("llama", [SHARED]),
        ("llama", [BY_INFLUENCE, GPTQ]),
        ("qwen2", [REFINED, GPTQ]),
        ("opt", [REFINED]),
        ("gpt_neox", [REFERENCE]),
        ("phi", [REFINED]),
        ("gemma2", [REFINED]),
        ("qwen3_moe", [REFINED]),
    ],
)
def test_a_gpu_makes_what_the_processor_makes(
    tmp_path: Path, model_type: ModelType, steps: list[dict[str, Any]]
) -> None:
    folder = make_tiny_model(tmp_path / "model", model_type, layers=3)
    here, loss = made(folder, tmp_path / "here", recipe(*steps), CPU)
    with pretended():
        away, loss_away = made(folder, tmp_path / "away", recipe(*steps), GPU)
    assert away.shapes == here.shapes
    assert loss_away == pytest.approx(loss, rel=1e-5)
    for index in range(len(here.shapes)):
        one, other = here.blocks.get(index), away.blocks.get(index)
        assert one is not None
        assert other is not None
        for name, tensor in one.state.items():
            torch.testing.assert_close(
                other.state[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n} {m}"
            )


def test_the_whole_job_runs_there_and_its_report_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU that is not there")
    folder = make_tiny_model(tmp_path / "model")
    with pretended():
        report = compress(
            recipe(REFINED),
            folder,
            tmp_path / "target",
            model="tiny",
            blocks=tmp_path / "blocks",
            progress=NullSink(),
            files={},
            roots=None,
            hub_offline=True,
            device=GPU,
        )
    assert report.device == "cuda:0 (a GPU that is not there)"
    assert report.reload.max_logit_difference <= report.reload.tolerance


def test_what_a_pretended_gpu_refuses() -> None:
    with pretended() as gpu:
        away = torch.ones(2, 3, device=gpu)
        with pytest.raises(RuntimeError, match="two devices"):
            away + torch.ones(2, 3)
        with placed_on(gpu):
            assert (away + torch.ones(2, 3)).device == gpu
        assert away.cpu().device == CPU


@pytest.mark.parametrize("asked", ["gpu", "cpu:0", "cuda:-1", "CUDA"])
def test_other_names_are_refused(asked: str) -> None:
    with pytest.raises(InvalidRequest, match="auto, cpu, cuda and cuda:N") as caught:
        choose_device(asked)
    assert caught.value.code == "device_unknown"


@pytest.mark.parametrize(("there", "asked"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_device_that_is_not_there_is_refused(there: int, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(InvalidRequest) as caught:
        choose_device(asked)
    assert caught.value.code == "device_missing"


def test_which_device_a_name_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu") == CPU
    assert choose_device("auto") == choose_device("cuda:0") == torch.device("cuda", 0)
    assert [choose_device("cuda", process) for process in (1, 2)] == [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert choose_device("cuda:1", 4) == torch.device("cuda", 1)
    assert named(CPU) == "cpu"
