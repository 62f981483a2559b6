"""The reload proof: it sees a wrong weight, a missing tensor, a folder that does not load; it may not import us."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from api_schemas.errors import JobFailed
from compression.reload import prove, run_probe, too_large_to_run
from tests.compression.core.test_artifact import write
from tests.compression.walks import Walk, expected_logits, random_tokens, step, walk
from tests.tiny_models import make_tiny_model


@pytest.fixture
def artifact(tmp_path: Path) -> tuple[Walk, Path]:
    folder = make_tiny_model(tmp_path / "in", "llama", tied=True)
    done = walk(folder, step(layout="portable"), random_tokens(4, 32))
    write(done, folder, tmp_path / "out", "portable")
    return done, tmp_path / "out"


def test_a_true_artifact_is_proven_in_a_process_without_this_project(artifact: tuple[Walk, Path]) -> None:
    done, folder = artifact
    tokens = random_tokens(1, 40, seed=4)
    probed = run_probe(folder, tokens, generate=3, logits=True, project_code=False)
    proof = prove(probed, expected_logits(done.model, done.method, done.store, tokens), project_code=False)
    assert proof.max_logit_difference < 1e-4
    assert "LlamaForCausalLM (stock transformers" in proof.loader
    assert probed.tokens_per_second is not None
    assert probed.tokens_per_second > 0
    assert probed.peak_memory_bytes > 100 * 1024**2


def test_one_wrong_row_is_seen(artifact: tuple[Walk, Path]) -> None:
    done, folder = artifact
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = weight.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(1, 40, seed=4)
    probed = run_probe(folder, tokens, generate=0, logits=True, project_code=False)
    with pytest.raises(JobFailed) as caught:
        prove(probed, expected_logits(done.model, done.method, done.store, tokens), project_code=False)
    assert caught.value.code == "reload_mismatch"


def test_a_missing_tensor_is_a_failure_by_name(artifact: tuple[Walk, Path]) -> None:
    _, folder = artifact
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobFailed, match=r"up_proj") as caught:
        run_probe(folder, random_tokens(1, 8), generate=0, logits=True, project_code=False)
    assert caught.value.code == "reload_failed"


def test_layout_full_needs_project_code_and_says_so(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    done = walk(folder, step(layout="full"), random_tokens(4, 32))
    write(done, folder, tmp_path / "out", "full")
    tokens = random_tokens(1, 40, seed=4)
    with pytest.raises(JobFailed, match="modepress_llama"):
        run_probe(tmp_path / "out", tokens, generate=0, logits=True, project_code=False)
    probed = run_probe(tmp_path / "out", tokens, generate=0, logits=True, project_code=True)
    proof = prove(probed, expected_logits(done.model, done.method, done.store, tokens), project_code=True)
    assert "compression.runtime" in proof.loader


def test_logits_that_are_not_finite_fail(artifact: tuple[Walk, Path]) -> None:
    done, folder = artifact
    tokens = random_tokens(1, 8)
    probed = run_probe(folder, tokens, generate=0, logits=True, project_code=False)
    expected = expected_logits(done.model, done.method, done.store, tokens)
    assert probed.logits is not None
    probed.logits[0, 0] = torch.nan
    with pytest.raises(JobFailed):
        prove(probed, expected, project_code=False)


def test_the_proof_holds_no_more_of_a_deep_model_than_of_a_shallow_one(tmp_path: Path) -> None:
    """In float32 the 12 further blocks weigh 151 MB, in their own type half of it."""
    peaks = []
    for layers in (2, 14):
        folder = make_tiny_model(
            tmp_path / str(layers), hidden=512, intermediate=1408, head_dim=128, layers=layers, dtype=torch.bfloat16
        )
        peaks.append(run_probe(folder, random_tokens(1, 32), generate=0, logits=True, project_code=False))
    shallow, deep = (probed.proof_memory_bytes for probed in peaks)
    assert shallow is not None
    assert deep is not None
    assert deep - shallow < 40 * 1024**2


def test_weights_are_widened_as_if_the_whole_model_were(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "mixtral", dtype=torch.bfloat16)
    tokens = random_tokens(1, 40)
    probed = run_probe(folder, tokens, generate=0, logits=True, project_code=False)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float()
    with torch.inference_mode():
        torch.testing.assert_close(probed.logits, whole(tokens).logits[0], rtol=0, atol=1e-5)


def test_a_model_larger_than_memory_is_not_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path)
    assert too_large_to_run(folder) is None
    monkeypatch.setattr("compression.reload.available_bytes", lambda: 1000)
    assert "1000 are available" in str(too_large_to_run(folder))
