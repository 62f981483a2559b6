"""The whole compression on other families: durable blocks, an artifact, and its proof in a fresh process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.core.streamed_model import tensors_of
from tests.compression.test_pipeline import recipe, run
from tests.tiny_models import make_tiny_model


@pytest.mark.parametrize(
    ("mode", "kind", "layout", "modules", "dtype"),
    [
        ("reference", "gpt2", "portable", ["mlp"], torch.float32),
        ("reference", "phi3", "full", ["mlp"], torch.bfloat16),
        ("reference", "gpt_neox", "full", None, torch.float32),
        ("reference", "smollm3", "portable", ["mlp", "query_key", "value_output"], torch.bfloat16),
        ("reference", "gemma3_text", "full", None, torch.bfloat16),
        ("reference", "mixtral", "portable", ["mlp", "query_key", "value_output"], torch.float32),
        ("reference", "qwen3_moe", "full", None, torch.float32),
        ("refined", "opt", "portable", None, torch.float32),
        ("refined", "gpt_neox", "portable", None, torch.bfloat16),
        ("refined", "granite", "portable", ["mlp", "query_key", "value_output"], torch.float32),
        ("refined", "gemma2", "portable", ["mlp", "query_key", "value_output"], torch.bfloat16),
        ("refined", "qwen3_moe", "portable", None, torch.float32),
        ("refined", "phi", "full", None, torch.float32),
        ("refined", "mixtral", "full", None, torch.bfloat16),
    ],
)
def test_from_folder_to_proven_artifact(
    tmp_path: Path, mode: str, kind: Any, layout: str, modules: Any, dtype: Any
) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, dtype=dtype, heads=2, kv_heads=2, head_dim=16, intermediate=96)
    step = {"mode": mode, "sparsity": 0.2, "round_to": 8, "layout": layout, "modules": modules}
    report = run(folder, tmp_path / "out", recipe(step))
    assert report.reload.max_logit_difference <= report.reload.tolerance
    assert report.block_parameters.after < 0.9 * report.block_parameters.before
    assert report.parameters.after == sum(
        entry.parameters for entry in tensors_of(tmp_path / "out").values() if not entry.dtype.startswith("I")
    )
    touched = {
        module.module
        for block in report.blocks
        for module in block.modules
        if module.width_after != module.width_before
    }
    if report.plan.shapes_final:
        assert touched == set(report.plan.modules)
    else:  # the budget may leave a part alone
        assert touched
        assert touched <= set(report.plan.modules)
