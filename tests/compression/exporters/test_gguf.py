"""GGUF files: the same model to two foreign readers, codes of Q8_0 by a float64 reference, refusals by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from api_schemas.errors import InvalidRecipe, JobFailed
from compression.exporters import gguf
from compression.exporters.gguf import main, write_gguf
from compression.importers.gguf import convert
from preflight.gguf_rules import SPLITS, GgufTokenizer, gguf_tokenizer
from tests.compression.core.test_artifact import portable_walk, write
from tests.compression.walks import random_tokens
from tests.tiny_models import make_tiny_model

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 96, "head_dim": 16, "layers": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def value(path: Path, key: str) -> Any:
    field = GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def logits(folder: Path, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
        result: torch.Tensor = model(random_tokens(1, 40, seed=9)).logits[0]
    return result


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_own_reader_computes_the_same_model(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", tied=tied, **SIZES)
    report = write_gguf(folder, tmp_path / "out" / "model.gguf", "f32")
    assert (report.architecture, report.relative_error, report.notes) == ("llama", 0.0, ())
    torch.testing.assert_close(logits(tmp_path / "out", gguf_file="model.gguf"), logits(folder), rtol=0, atol=1e-5)
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf"),
    )
    text = "The quick brown fox's 12 jumps; naïve?<|im_end|>\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_our_importer_gives_back_the_very_weights(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", dtype=torch.bfloat16, **SIZES)
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    back = convert(tmp_path / "model.gguf", tmp_path / "back")
    torch.testing.assert_close(logits(back), logits(folder), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_architecture_has_its_name_and_its_order_of_rows(tmp_path: Path, kind: Any) -> None:
    more = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}.get(kind, {})
    folder = make_tiny_model(tmp_path / "in", kind, **{**SIZES, **more})  # that reader knows no other head of Qwen3
    write_gguf(folder, tmp_path / "out" / "model.gguf", "f32")
    expected = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}[kind]
    assert value(tmp_path / "out" / "model.gguf", "general.architecture") == expected
    torch.testing.assert_close(logits(tmp_path / "out", gguf_file="model.gguf"), logits(folder), rtol=0, atol=1e-5)


def test_rows_of_queries_are_neighbours_in_pairs(tmp_path: Path) -> None:
    """(i, i + r/2) become (2i, 2i + 1), written down by hand for a head of 4 channels; biases alike."""
    folder = make_tiny_model(tmp_path / "in", "llama", heads=2, kv_heads=1, head_dim=4, hidden=32, bias=True)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    stored = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    for ours, theirs, rows in (("attn_q", "q_proj", order), ("attn_k", "k_proj", order[:4])):
        for part in ("weight", "bias"):
            wanted = stored[f"model.layers.0.self_attn.{theirs}.{part}"][rows].numpy()
            read = tensors(tmp_path / "model.gguf")[f"blk.0.{ours}.{part}"].data.reshape(wanted.shape)
            np.testing.assert_array_equal(read, wanted)
    values = stored["model.layers.0.self_attn.v_proj.bias"].numpy()
    np.testing.assert_array_equal(tensors(tmp_path / "model.gguf")["blk.0.attn_v.bias"].data, values)


def test_reduced_attention_has_factors_that_turn_by_the_kept_pairs(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", **{**SIZES, "head_dim": 16})
    done = portable_walk(folder)
    write(done, folder, tmp_path / "out", "portable")
    path = tmp_path / "out" / "model.gguf"
    report = write_gguf(tmp_path / "out", path, "f32")
    rank = done.method.shapes[0].query_key_rank
    pairs = done.store.results[0].state["self_attn.rotary_pairs"][0].double().numpy()
    stock = 10000.0 ** (-2 * np.arange(rank // 2) / rank)
    kept = 10000.0 ** (-2 * pairs / 16)
    factors = tensors(path)["rope_freqs.weight"].data
    np.testing.assert_allclose(stock / factors, kept, rtol=1e-5)
    sizes = [
        value(path, f"llama.{key}")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    ]
    assert sizes == [rank] * 3
    assert value(path, "llama.rope.scaling.type") is None
    assert report.tensors == {"F32": 31}  # 9 a block, embedding, norm and head, factors
    # What serve.json says of transformers' own reader: it takes the file without a word and computes another model.
    wrong = logits(tmp_path / "out", gguf_file="model.gguf") - logits(tmp_path / "out")
    assert wrong.abs().max() > 0.1


def test_llama3_scaling_becomes_factors(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", **SIZES, rope_parameters=LLAMA3)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    factors = tensors(tmp_path / "model.gguf")["rope_freqs.weight"].data
    frequencies = 10000.0 ** (-2 * np.arange(8) / 16)
    slow, fast = frequencies < 2 * np.pi / 64, frequencies > 4 * 2 * np.pi / 64
    np.testing.assert_allclose(factors[slow], 8.0, rtol=1e-6)
    np.testing.assert_allclose(factors[fast], 1.0, rtol=1e-6)
    assert ((factors >= 1) & (factors <= 8)).all()


def reference_q8_0(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and values of Q8_0 in float64: 127 steps to the largest magnitude of each 32 weights."""
    blocks = row.astype(np.float64).reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1) / 127
    codes = np.clip(np.round(blocks / np.where(scale == 0, 1, scale)[:, None]), -127, 127)
    stored = scale.astype(np.float16).astype(np.float64)
    return stored, (codes * stored[:, None]).reshape(row.shape)


def test_q8_0_is_the_float64_reference(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", **SIZES)
    report = write_gguf(folder, tmp_path / "model.gguf", "q8_0")
    read = tensors(tmp_path / "model.gguf")
    assert {read[name].tensor_type for name in ("blk.1.ffn_down.weight", "token_embd.weight", "output.weight")} == {
        GGMLQuantizationType.Q8_0
    }
    assert read["blk.1.ffn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    weight = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    got = dequantize(read["blk.1.ffn_down.weight"].data, GGMLQuantizationType.Q8_0).reshape(weight.shape)
    scales, wanted = zip(*(reference_q8_0(row) for row in weight), strict=True)
    steps = np.repeat(np.stack(scales), 32, axis=1)
    # float32 against float64 may round a tie to the other side: then one step apart, else equal
    apart = np.abs(got - np.stack(wanted)) / steps
    assert (apart < 1e-4).mean() > 0.999
    assert apart.max() < 1.001
    assert (np.abs(got - weight) <= 0.5 * steps * 1.01 + np.abs(weight) * 2.0**-10).all()
    assert 0 < report.relative_error < 0.01


def test_rows_that_cannot_be_quantised_stay_in_16_bits_and_are_counted(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", **{**SIZES, "intermediate": 48}, dtype=torch.bfloat16)
    report = write_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert report.tensors["BF16"] == 3  # the three down projections: rows of 48
    assert report.notes == ("3 matrices stay in 16 bits: their rows are no multiple of 32",)
    assert tensors(tmp_path / "model.gguf")["blk.0.ffn_down.weight"].tensor_type == GGMLQuantizationType.BF16


def test_a_file_that_reads_back_otherwise_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", **SIZES)
    honest = gguf.quantize
    monkeypatch.setattr(
        gguf, "quantize", lambda values, kind: honest(values[..., ::-1] if values.ndim == 2 else values, kind)
    )
    with pytest.raises(JobFailed, match="reads back") as caught:
        write_gguf(folder, tmp_path / "out" / "model.gguf", "f32")
    assert caught.value.code == "export_mismatch"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "settings", "code"),
    [
        ("gpt2", {}, "gguf_family"),
        ("gemma2", {}, "gguf_family"),
        ("mistral", {"sliding_window": 16}, "gguf_window"),
        ("llama", {"hidden_act": "gelu"}, "gguf_activation"),
        ("qwen3", {"bias": True}, "gguf_bias"),
        ("qwen2", {"head_dim": 16}, "gguf_heads"),
        ("qwen2", {"rope_parameters": LLAMA3}, "gguf_rotary"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "gguf_rotary"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, kind: Any, settings: Any, code: str) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    with pytest.raises(InvalidRecipe) as caught:
        write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert caught.value.code == code


def with_splits(folder: Path, pre: Any, *, ignore_merges: bool = False) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre
    tokenizer.model.ignore_merges = ignore_merges
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_ways_to_split_a_text_are_recognised_not_guessed(tmp_path: Path) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by_name = {name: Regex(expression) for expression, name in SPLITS.items()}
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cases = [
        (whole, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole]), False, "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(by_name["qwen2"], "isolated"), byte_level]), False, "qwen2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Split(by_name["llama-bpe"], "isolated"), byte_level]),
            True,
            "llama-bpe",
        ),
    ]
    folder = make_tiny_model(tmp_path / "in", "llama")
    for pre, ignore_merges, name in cases:
        assert gguf_tokenizer(with_splits(folder, pre, ignore_merges=ignore_merges)) == GgufTokenizer("gpt2", name)
        refused = gguf_tokenizer(with_splits(folder, pre, ignore_merges=not ignore_merges))
        assert isinstance(refused, str)
        assert "ignore_merges" in refused
    for pre in (pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        refused = gguf_tokenizer(with_splits(folder, pre))
        assert isinstance(refused, str)
        assert "splits" in refused


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidRecipe, match=r"no tokenizer\.json") as caught:
        write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert caught.value.code == "gguf_tokenizer"


def test_rows_beyond_the_tokenizer_are_filled(tmp_path: Path) -> None:
    """Embeddings are often padded; the file needs a token for each row."""
    folder = make_tiny_model(tmp_path / "in", "llama", **SIZES)
    tokenizer = make_tiny_model(tmp_path / "small", "llama", **SIZES)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    gone = max(content["model"]["vocab"].items(), key=lambda item: item[1])
    del content["model"]["vocab"][gone[0]]
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "".join(merge) != gone[0]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    listed = value(tmp_path / "model.gguf", "tokenizer.ggml.tokens")
    assert (len(listed), listed[gone[1]]) == (384, f"[PAD{gone[1]}]")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    assert main([str(folder), str(tmp_path / "model.gguf"), "--dtype", "bf16"]) == 0
    assert "llama" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    assert main([str(tmp_path / "other"), str(tmp_path / "model.gguf")]) == 1
    assert capsys.readouterr().err.startswith("gguf_tokenizer: ")
