"""Packed weights of every family, in both layouts: the package's reader, ours and what was computed agree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from api_schemas.methods import GptqConfig, RoundToNearestConfig
from compression.core.streamed_model import StreamedModel
from compression.reload import logits_of
from preflight.families import resolve
from tests.compression.kinds import CASES
from tests.compression.packed import pack_model, pack_walk
from tests.compression.walks import random_tokens, step, walk
from tests.tiny_models import make_tiny_model

GPTQ = GptqConfig(method="gptq", bits=4, group_size=None)
STOCK = [(kind, settings) for kind, settings in CASES if kind not in ("gpt2", "mixtral", "qwen3_moe")]


def check_readers(folder: Path, computed: Any, tokens: torch.Tensor) -> Any:
    """Load an artifact by the library and block by block, and compare both with what was computed."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        model(tokens[:, :1])  # unpacks
        got = torch.nn.Module.float(model)(tokens).logits[0]
    want = logits_of(computed, tokens)
    streamed = StreamedModel(folder, computed.family)
    torch.testing.assert_close(logits_of(streamed, tokens), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for index in range(streamed.blocks):  # to the bit, in storage dtype
        ours, theirs = streamed.block_state(index), computed.block_state(index)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name in ours)
    return model


@pytest.mark.parametrize(("kind", "settings"), STOCK)
def test_a_stock_class_loads_packed_weights(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    computed = pack_model(folder, tmp_path / "out", GPTQ, random_tokens(8, 32))
    model = check_readers(tmp_path / "out", computed, random_tokens(1, 40, seed=9))
    assert type(model).__module__.startswith("transformers.models.")


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_layout_full_loads_packed_weights(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    done = walk(folder, step(layout="full"), random_tokens(8, 32))
    computed = pack_walk(done, tmp_path / "out", GPTQ, "full")
    check_readers(tmp_path / "out", computed, random_tokens(1, 40, seed=9))


@pytest.mark.parametrize("bits", [4, 8])
def test_in_bfloat16_the_bits_are_those_that_were_computed_with(tmp_path: Path, bits: Any) -> None:
    folder = make_tiny_model(tmp_path / "in", "phi3", hidden=64, intermediate=96, head_dim=16, dtype=torch.bfloat16)
    config = RoundToNearestConfig(method="round_to_nearest", bits=bits, group_size=32)
    computed = pack_model(folder, tmp_path / "out", config, random_tokens(4, 32))
    model = check_readers(tmp_path / "out", computed, random_tokens(1, 40, seed=9))
    fused = model.model.layers[1].self_attn.qkv_proj.weight
    state = computed.block_state(1)
    parts = torch.cat([state[f"self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(fused, parts.float())
    assert resolve(computed.before.config.to_dict()).name == "phi3"


def test_experts_that_saw_no_token_are_rounded_to_nearest_and_named(tmp_path: Path) -> None:
    """T21: one calibration token reaches two of four experts."""
    folder = make_tiny_model(tmp_path / "in", "qwen3_moe", layers=1)
    done = walk(folder, step(layout="full"), random_tokens(8, 32))
    computed = pack_walk(replace(done, tokens=random_tokens(1, 1)), tmp_path / "out", GPTQ, "full")
    rows = computed.store.get(0).report.modules
    assert len(rows) == 4 + 3 * 4
    unseen = [row for row in rows if row.fallback and row.fallback.startswith("no calibration token")]
    assert len(unseen) == 3 * 2
    assert {row.coverage for row in unseen} == {(0,)}
    check_readers(tmp_path / "out", computed, random_tokens(1, 40, seed=9))
