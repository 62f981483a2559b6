"""Packed models are served from what was computed with: unpacked while loading, counted as what they will occupy."""

import pytest
import torch

from api_schemas.methods import GptqConfig
from compression.reload import logits_of
from tests.compression.packed import pack_model, pack_walk
from tests.compression.walks import random_tokens, step, walk
from tests.tiny_models import make_tiny_model
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

CONFIG = GptqConfig(method="gptq", bits=4, group_size=None)


@pytest.mark.parametrize("layout", ["portable", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_answers_as_it_was_computed(tmp_path, layout, dtype):
    folder = make_tiny_model(tmp_path / "in", "llama", dtype=dtype)
    tokens = random_tokens(4, 32)
    if layout == "portable":
        computed = pack_model(folder, tmp_path / "out", CONFIG, tokens)
    else:
        computed = pack_walk(walk(folder, step(layout=layout), tokens), tmp_path / "out", CONFIG, layout)
    plan = plan_load(ModelSource("packed", tmp_path / "out", 1.0))
    loaded = load(plan)
    assert plan.packed
    assert loaded.bytes == pytest.approx(plan.bytes, rel=0.05)  # unpacked already, before the first request
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype is plan.precision.dtype
    assert torch.equal(weight.to(dtype), computed.block_state(0)["mlp.up_proj.weight"])
    prompt = random_tokens(1, 20, seed=5)
    with torch.inference_mode():
        got = loaded.model(prompt).logits[0].float()
    close = {"rtol": 1e-4, "atol": 1e-4} if plan.precision.dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(got, logits_of(computed, prompt), **close)


def test_plain_models_are_not_taken_for_packed_ones(tiny_folders):
    assert not plan_load(ModelSource("plain", tiny_folders["llama"], 1.0)).packed
