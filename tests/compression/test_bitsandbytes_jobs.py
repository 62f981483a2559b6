"""Whole jobs with int8 and nf4: alone, after modegpt, in a composite, and cut in the middle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression.core.protocols import Cancelled
from preflight.checkpoint import open_checkpoint
from preflight.composites import COMPOSITES
from tests.compression.test_composites import job
from tests.compression.test_composites import run as run_composite
from tests.compression.test_composition import MODEGPT, StopIn, recipe, stored_bytes
from tests.compression.test_pipeline import hashes, run
from tests.tiny_composites import make_tiny_composite
from tests.tiny_models import make_tiny_model

PAIRS = [
    ({**MODEGPT, "round_to": 64}, {"method": "nf4", "double_quantization": True}),
    ({**MODEGPT, "layout": "full", "modules": ["mlp", "query_key"]}, {"method": "int8", "skip_modules": ["o_proj"]}),
]


@pytest.mark.parametrize("steps", PAIRS)
def test_a_job_plans_makes_proves_and_reports_both_steps(tmp_path: Path, steps: tuple[dict[str, Any], ...]) -> None:
    """T20, T27."""
    folder = make_tiny_model(
        tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, tied=True, dtype=torch.bfloat16
    )
    report = run(folder, tmp_path / "out", recipe(*steps, generation_tokens=3))
    assert report.plan.blockers == ()
    assert report.steps[1].bytes.after == report.plan.bytes_after == stored_bytes(tmp_path / "out")
    assert report.parameters.after == report.plan.parameters_after
    assert report.reload.max_logit_difference <= report.reload.tolerance
    made = [part for row in report.blocks if row.step == 1 for part in row.modules]
    assert {part.bits for part in made} == {4 if steps[1]["method"] == "nf4" else 8}
    assert len(made) == sum(one.bits is not None for one in report.plan.quantized)


def test_a_cut_in_the_second_step_changes_no_byte(tmp_path: Path) -> None:
    """T25."""
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, dtype=torch.bfloat16)
    asked = recipe({"method": "nf4", "double_quantization": True, "error_correction": True})
    with pytest.raises(Cancelled):
        run(folder, tmp_path / "out", asked, sink=StopIn("quantizing", 1))
    run(folder, tmp_path / "out", asked)
    run(folder, tmp_path / "whole", asked)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_composite_keeps_its_other_parts_and_loads_in_stock_classes(tmp_path: Path) -> None:
    step = {"method": "nf4", "skip_modules": ["self_attn"]}
    folder = make_tiny_composite(tmp_path / "m", "qwen3_vl", COMPOSITES["qwen3_vl"].decoder, hidden=64, intermediate=64)
    report = run_composite(job(steps=[step]), folder, tmp_path / "a")
    assert "stock transformers, without" in report.reload.loader
    written = open_checkpoint(tmp_path / "a")
    assert written.placed is not None
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "a"))
    assert all(before[name].equal(after[name]) for name in written.placed.others)
