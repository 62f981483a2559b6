"""int8 and nf4: what stock transformers loads is what it would have made itself, and what was computed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from api_schemas.methods import Int8Config, Nf4Config
from compression.core.streamed_model import StreamedModel
from compression.reload import logits_of
from tests.compression.kinds import CASES
from tests.compression.packed import pack_model, pack_walk
from tests.compression.walks import random_tokens, step, walk
from tests.tiny_models import make_tiny_model

INT8 = Int8Config(method="int8", outlier_threshold=2.0)
NF4 = Nf4Config(method="nf4", compute_dtype="float32")
ONE_EACH = list({kind: (kind, settings) for kind, settings in CASES}.values())
STOCK = [(kind, settings) for kind, settings in ONE_EACH if kind not in ("gpt2", "mixtral", "qwen3_moe")]
FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, tokens, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not any(name.startswith("compression") for name in sys.modules)
state = {name: one.contiguous().clone() for name, one in model.state_dict().items()}
with torch.inference_mode():
    state["logits"] = model.eval()(load_file(tokens)["tokens"]).logits[0].float()
save_file(state, out)
"""


def fresh(folder: Path, scratch: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """State and logits of a folder as stock transformers has them in a process of its own."""
    from safetensors.torch import save_file

    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    out = scratch / "out.safetensors"
    command = [sys.executable, "-I", "-c", FRESH, str(folder), str(scratch / "tokens.safetensors"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.parametrize(("config", "asked"), [(INT8, {"load_in_8bit": True, "llm_int8_threshold": 2.0}), (NF4, {})])
def test_a_fresh_process_loads_the_bytes_and_answers_as_the_library_would(
    tmp_path: Path, config: Any, asked: dict[str, Any]
) -> None:
    """The library's own quantisation of the original is the independent half: same bytes, same logits, to the bit."""
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, dtype=torch.bfloat16)
    pack_model(folder, tmp_path / "out", config, random_tokens(2, 32))
    tokens = random_tokens(1, 40, seed=9)
    got = fresh(tmp_path / "out", tmp_path, tokens)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(got[name], one) for name, one in stored.items())
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    own = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**(asked or four)))
    want = {name: one.clone() for name, one in own.state_dict().items()}
    assert all(torch.equal(stored[name], want[name]) for name in stored)
    with torch.inference_mode():
        assert torch.equal(got["logits"], own.eval()(tokens).logits[0].float())


def plain_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What the library says that the codes stand for, in float32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        return torch.nn.Module.float(model.dequantize(torch.float32))(tokens).logits[0]


def check(folder: Path, computed: Any) -> None:
    tokens = random_tokens(1, 40, seed=9)
    torch.testing.assert_close(plain_logits(folder, tokens), logits_of(computed, tokens), rtol=1e-4, atol=1e-4)
    streamed = StreamedModel(folder, computed.family)
    for index in range(streamed.blocks):
        ours, theirs = streamed.block_state(index), computed.block_state(index)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name in ours)


def test_what_int8_is_judged_on_is_what_its_kernels_compute(tmp_path: Path) -> None:
    """Inputs are rounded too, and that is most of what LLM.int8 costs: a judgement of weights alone would miss it."""
    folder = make_tiny_model(tmp_path / "in", "phi3", hidden=64, intermediate=96, head_dim=16)
    config = Int8Config(method="int8", outlier_threshold=1.0)
    computed = pack_model(folder, tmp_path / "out", config, random_tokens(2, 32))
    tokens = random_tokens(1, 40, seed=9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        kernels = model(tokens).logits[0]
    judged = logits_of(StreamedModel(tmp_path / "out", computed.family), tokens)
    weights = logits_of(computed, tokens)
    assert (judged - kernels).norm() < 0.05 * (weights - kernels).norm()


@pytest.mark.parametrize("config", [INT8, NF4])
def test_skipped_linears_are_loaded_as_they_were(tmp_path: Path, config: Any) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=192, head_dim=16, layers=2)
    named = config.model_copy(update={"skip_modules": ("model.layers.1", "o_proj")})
    computed = pack_model(folder, tmp_path / "out", named, random_tokens(2, 32))
    check(tmp_path / "out", computed)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    kept = [name for name in before if ".layers.1." in name or "o_proj" in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert f"model.layers.0.mlp.up_proj.{'SCB' if config is INT8 else 'weight.absmax'}" in after
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.o_proj" in settings["llm_int8_skip_modules"]


@pytest.mark.parametrize(("kind", "settings"), STOCK)
def test_a_stock_class_of_every_family_loads_the_codes(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    computed = pack_model(folder, tmp_path / "out", INT8, random_tokens(2, 32))
    check(tmp_path / "out", computed)
    before, after = (StreamedModel(one, computed.family).parameters for one in (folder, tmp_path / "out"))
    assert before == after


@pytest.mark.parametrize(("kind", "settings"), ONE_EACH)
def test_layout_full_of_every_family_loads_the_codes(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    done = walk(folder, step(layout="full"), random_tokens(4, 32))
    check(tmp_path / "out", pack_walk(done, tmp_path / "out", INT8, "full"))
