"""Models of bitsandbytes' codes are served as codes: small in memory, and answers near what the codes stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from api_schemas.errors import InvalidCheckpoint
from api_schemas.methods import Int8Config, Nf4Config
from compression.reload import logits_of
from preflight.checkpoint import open_checkpoint
from tests.compression.packed import pack_model, pack_walk
from tests.compression.walks import random_tokens, step, walk
from tests.tiny_models import make_tiny_model
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

INT8, NF4 = Int8Config(method="int8"), Nf4Config(method="nf4")


@pytest.mark.parametrize("layout", ["portable", "full"])
@pytest.mark.parametrize("config", [INT8, NF4])
def test_codes_stay_codes_and_answer_near_what_they_stand_for(tmp_path: Path, layout: str, config: Any) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, dtype=torch.bfloat16)
    tokens = random_tokens(4, 32)
    if layout == "portable":
        computed = pack_model(folder, tmp_path / "out", config, tokens)
    else:
        done = walk(folder, step(layout=layout, round_to=64, modules=["mlp"]), tokens)
        computed = pack_walk(done, tmp_path / "out", config, layout)
    plan = plan_load(ModelSource("codes", tmp_path / "out", 1.0))
    loaded = load(plan)
    assert plan.codes
    assert not plan.packed
    assert plan.precision.stored is torch.bfloat16  # not the scales' float32
    assert loaded.bytes == pytest.approx(plan.bytes, rel=0.06)
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype in (torch.int8, torch.uint8)
    prompt = random_tokens(1, 20, seed=5)
    with torch.inference_mode():
        got = loaded.model(prompt).logits[0].float()
    want = logits_of(computed, prompt)
    assert (got - want).norm() < 0.1 * want.norm()


def test_codes_that_the_kernels_refuse_fail_while_loading(tmp_path: Path) -> None:
    """A plan refuses them; a folder from elsewhere may hold them. Only CPUs with bfloat16 have the kernel."""
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, kv_heads=1)
    pack_model(folder, tmp_path / "out", NF4, random_tokens(2, 32))
    assert open_checkpoint(tmp_path / "out").tensors
    from bitsandbytes.functional import has_avx512bf16

    plan = plan_load(ModelSource("codes", tmp_path / "out", 1.0))
    if not has_avx512bf16():
        assert load(plan).bytes
        return
    with pytest.raises(InvalidCheckpoint) as caught:
        load(plan)
    assert caught.value.code == "model_load_failed"
    assert "block_n" in caught.value.message
