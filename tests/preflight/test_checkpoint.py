"""What a checkpoint is, its configuration and its tokenizer: sound ones are described, others named."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from api_schemas.errors import InvalidCheckpoint
from preflight.checkpoint import describe, open_checkpoint
from tests.preflight.breaking import WEIGHTS, blocker_codes, edit_json, edit_tensors, refused
from tests.tiny_models import make_tiny_model


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_facts_are_those_of_the_loaded_model(tmp_path: Path, model_type: Any, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "m", model_type, tied=tied, bias=model_type == "llama", dtype=torch.bfloat16)
    facts = describe(open_checkpoint(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert facts.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert facts.block_parameters == sum(parameter.numel() for parameter in loaded.model.layers.parameters())
    assert facts.bytes == 2 * facts.parameters
    assert (facts.family, facts.model_type, facts.blocks, facts.tied_head) == (model_type, model_type, 2, tied)
    assert (facts.dtype, facts.dtypes, facts.vocabulary) == ("BF16", {"BF16": facts.parameters}, 384)
    assert facts.has_tokenizer
    assert facts.has_chat_template
    assert facts.blockers == ()
    assert facts.warnings == ()


def test_shards_and_one_file_are_the_same_checkpoint(model: Path, sharded: Path) -> None:
    one, many = open_checkpoint(model), open_checkpoint(sharded)
    assert {name: entry.shape for name, entry in one.tensors.items()} == {
        name: entry.shape for name, entry in many.tensors.items()
    }
    assert describe(one) == describe(many)
    assert len({entry.file for entry in many.tensors.values()}) > 2


def test_side_files_are_all_but_weights_and_configuration(sharded: Path) -> None:
    (sharded / "LICENSE").write_text("free")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (sharded / ".gitattributes").write_text("x")
    (sharded / "model.gguf").write_bytes(b"GGUF")
    (sharded / "onnx").mkdir()
    (sharded / "onnx" / "model.onnx").write_bytes(b"\x08")
    checkpoint = open_checkpoint(sharded)
    assert set(checkpoint.side_files) == {
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (warning,) = describe(checkpoint).warnings
    assert all(name in warning for name in (".gitattributes", "model.gguf", "onnx/model.onnx"))


def test_opening_needs_no_torch(model: Path) -> None:
    code = (
        "import sys, pathlib; from preflight.checkpoint import describe, open_checkpoint; "
        "describe(open_checkpoint(pathlib.Path(sys.argv[1]))); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(model)], check=False).returncode == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1, "a": 2}',
        b"\xff\xfe{}",
        b'{"a": Infinity}',
        b"[" * 100_000,
        b" " * (4 * 1024**2) + b"{}",
    ],
    ids=["empty", "list", "cut", "duplicate", "utf16", "infinity", "deep", "large"],
)
def test_unsound_configuration(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    error = refused(model)
    assert (error.code, error.param) == ("invalid_config", "config.json")


def test_no_configuration_and_no_folder(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    assert refused(model).code == "missing_config"
    assert refused(tmp_path / "nowhere").code == "folder_not_found"
    assert refused(model / WEIGHTS).code == "folder_not_found"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_remote_code_by_configuration(model: Path, file: str) -> None:
    edit_json(model / file, lambda c: c.update(inner=[{"auto_map": {"AutoModelForCausalLM": "evil--model.Model"}}]))
    error = refused(model)
    assert (error.code, error.param) == ("remote_code_refused", "auto_map")


def test_remote_code_by_attention_kernel(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(_attn_implementation="evil/kernel"))
    assert refused(model).code == "remote_code_refused"


def test_remote_code_by_file(model: Path) -> None:
    (model / "modeling_evil.py").write_text("raise SystemExit")
    error = refused(model)
    assert (error.code, error.param) == ("remote_code_refused", "modeling_evil.py")


@pytest.mark.parametrize("change", [{"model_type": "bloom"}, {"model_type": None}, {"model_type": ["llama"]}])
def test_unknown_architecture_is_a_blocker(model: Path, change: dict[str, Any]) -> None:
    edit_json(model / "config.json", lambda config: config.update(change))
    facts = describe(open_checkpoint(model))
    assert [blocker.code for blocker in facts.blockers] == ["unsupported_architecture"]
    assert facts.family is None
    assert facts.block_parameters == 15488


def test_an_architecture_for_another_task_is_a_blocker(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(architectures=["LlamaForSequenceClassification"]))
    assert blocker_codes(model) == ["unsupported_architecture"]
    edit_json(model / "config.json", lambda c: c.update(architectures="LlamaForCausalLM"))
    assert refused(model).code == "invalid_config"


def test_quantised_weights_are_a_blocker(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    edit_tensors(model, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, dtype=torch.int32)}))
    assert blocker_codes(model) == ["already_quantized", "unsupported_dtype"]


def test_no_tokenizer_is_a_blocker(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    facts = describe(open_checkpoint(model))
    assert [blocker.code for blocker in facts.blockers] == ["tokenizer_missing"]
    assert not facts.has_tokenizer


def test_no_chat_template_is_a_warning(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    facts = describe(open_checkpoint(model))
    assert facts.blockers == ()
    assert not facts.has_chat_template
    assert "chat template" in facts.warnings[0]
    edit_json(model / "tokenizer_config.json", lambda settings: settings.update(chat_template="{{ messages }}"))
    assert describe(open_checkpoint(model)).has_chat_template


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"vocab": 5}}', '{"model": []}'])
def test_unsound_tokenizer(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    error = refused(model)
    assert (error.code, error.param) == ("invalid_tokenizer", "tokenizer.json")


def test_a_tokenizer_with_more_tokens_than_the_model(model: Path) -> None:
    edit_json(model / "tokenizer.json", lambda t: t["model"]["vocab"].update(surplus=384))
    assert blocker_codes(model) == ["tokenizer_mismatch"]


KEYS = st.sampled_from(
    "model_type architectures hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size "
    "num_hidden_layers vocab_size tie_word_embeddings attention_bias quantization_config "
    "max_position_embeddings".split()
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(max_size=5), LEAVES, max_size=2)


@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_whatever_the_configuration_only_one_kind_of_error(model: Path, changes: dict[str, Any]) -> None:
    original = (model / "config.json").read_text()
    edit_json(model / "config.json", lambda config: config.update(changes))
    try:
        checkpoint = open_checkpoint(model)
    except InvalidCheckpoint:
        return
    finally:
        (model / "config.json").write_text(original)
    assert describe(checkpoint).parameters == 40096
