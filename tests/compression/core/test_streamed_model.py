"""Running block by block is running the model: against transformers' own forward pass."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from api_schemas.errors import InvalidCheckpoint
from compression.core.blockwise import run_block_
from compression.core.statistics import BlockStatistics
from compression.core.streamed_model import StreamedModel
from preflight.checkpoint import describe, open_checkpoint
from preflight.families import resolve
from tests.compression.kinds import CASES
from tests.compression.walks import random_tokens
from tests.tiny_models import make_tiny_model


def streamed_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(folder, resolve(json.loads((folder / "config.json").read_text())))
    with torch.inference_mode():
        hidden = model.embed(tokens)
        for index in range(model.blocks):
            run_block_(model, model.block(index, model.block_state(index)), index, hidden)
        with model.head() as head:
            return head(hidden)


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_streamed_logits_are_the_models_own(tmp_path: Path, kind: str, settings: dict) -> None:
    folder = make_tiny_model(tmp_path, kind, **settings)
    tokens = random_tokens(3, 20)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(streamed_logits(folder, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), CASES)
@torch.inference_mode()
def test_products_in_bfloat16_are_near_those_in_float32_and_statistics_stay_in_float32(
    tmp_path: Path, kind: str, settings: dict
) -> None:
    folder = make_tiny_model(tmp_path, kind, **settings)
    model = StreamedModel(folder, resolve(json.loads((folder / "config.json").read_text())))
    block, hidden = model.block(0, model.block_state(0)), model.embed(random_tokens(3, 20))
    exact = model.forward(block, hidden, 0)
    whole, rough = BlockStatistics(model.family, model.size), BlockStatistics(model.family, model.size)
    with whole.watching(block):
        model.forward(block, hidden, 0)
    with model.products_in("bfloat16"), rough.watching(block):
        near = model.forward(block, hidden, 0)
    rounding = 0.3 if model.family.experts else 0.05  # a token between two experts may change sides
    assert 0 < (near - exact).norm() < rounding * (exact - hidden).norm()
    assert near.dtype == torch.float32
    assert torch.equal(model.forward(block, hidden, 0), exact)  # and as before when it ends
    for name in ("value", "mlp"):
        said, meant = getattr(rough, name).mean(), getattr(whole, name).mean()
        assert (said - meant).norm() < rounding * meant.norm()
        assert torch.linalg.eigvalsh(said).min() > -1e-6 * said.diagonal(dim1=-2, dim2=-1).mean()  # exact sums


def test_a_sliding_window_shorter_than_the_text_is_honoured(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "mistral")
    config = json.loads((folder / "config.json").read_text())
    config["sliding_window"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(2, 24)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(streamed_logits(folder, tokens), expected, rtol=1e-5, atol=1e-5)


def test_old_checkpoints_of_the_bare_decoder_are_read_under_full_names(tmp_path: Path) -> None:
    """GPT-2 as it was first published: no `transformer.` prefix, and the causal mask stored in every block."""
    folder = make_tiny_model(tmp_path, "gpt2", tied=True)
    tokens = random_tokens(2, 20)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    state = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    state |= {f"h.{index}.attn.bias": torch.ones(1, 1, 8, 8) for index in range(2)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert describe(checkpoint).blockers == ()
    torch.testing.assert_close(streamed_logits(folder, tokens), expected, rtol=1e-5, atol=1e-5)
    streamed = StreamedModel(folder, resolve(checkpoint.config), checkpoint.tensors)
    assert "attn.bias" not in streamed.block_state(0)


def test_the_embedding_factor_is_rounded_as_stock_code_rounds_it(tmp_path: Path) -> None:
    """√48 is 6.928, but 6.9375 in bfloat16, which is what a Gemma in bfloat16 multiplies by."""
    folder = make_tiny_model(tmp_path, "gemma2", hidden=48, dtype=torch.bfloat16)
    tokens = random_tokens(2, 20)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float()(tokens).logits
    torch.testing.assert_close(streamed_logits(folder, tokens), expected, rtol=1e-5, atol=1e-5)


def test_nan_weights_are_named_when_they_are_read(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    streamed = StreamedModel(folder, resolve(json.loads((folder / "config.json").read_text())))
    with pytest.raises(InvalidCheckpoint) as caught:
        streamed.block_state(1)
    assert caught.value.code == "non_finite_weights"
    assert "layers.1.mlp.up_proj.weight" in caught.value.message
