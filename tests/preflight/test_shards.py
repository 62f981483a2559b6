"""Weights that are cut, missing, doubled, misplaced or not what the configuration asks for."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from preflight.checkpoint import describe, open_checkpoint
from tests.preflight.breaking import INDEX, WEIGHTS, edit_json, edit_tensors, refused


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    error = refused(sharded)
    assert (error.code, error.param) == ("missing_shard", gone.name)


def test_truncated_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    error = refused(sharded)
    assert (error.code, error.param) == ("truncated_file", path.name)


def test_tensor_missing_from_the_index(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    error = refused(sharded)
    assert error.code == "unindexed_tensor"
    assert "model.norm.weight" in error.message


def test_index_that_names_an_absent_tensor(sharded: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.extra.weight"] = index["weight_map"]["model.norm.weight"]

    edit_json(sharded / INDEX, change)
    error = refused(sharded)
    assert error.code == "missing_tensor"
    assert "model.extra.weight" in error.message


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        places["model.norm.weight"] = next(p for p in places.values() if p != places["model.norm.weight"])

    edit_json(sharded / INDEX, change)
    assert refused(sharded).code == "missing_tensor"


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    tensors.update(load_file(first))
    save_file(tensors, second, {"format": "pt"})
    assert refused(sharded).code == "duplicate_tensor"


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "..\\x.safetensors",
        "config.json",
        "\0.safetensors",
    ],
)
def test_shard_names_that_lead_elsewhere(sharded: Path, shard: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": shard}))
    assert refused(sharded).code == "unsafe_shard_name"


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "{", "\xff"]
)
def test_unsound_index(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_bytes(index.encode("latin-1"))
    assert refused(sharded).code == "invalid_index"


def test_weights_that_no_index_names(model: Path, sharded: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "extra.safetensors")
    assert refused(model).code == "unindexed_shard"
    shutil.copy(model / WEIGHTS, sharded / "extra.safetensors")
    assert refused(sharded).code == "unindexed_shard"
    (sharded / "extra.safetensors").rename(sharded / WEIGHTS)
    assert refused(sharded).code == "ambiguous_weights"


def test_a_vendors_second_copy_is_left_aside_with_a_warning(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "consolidated.safetensors")
    assert "consolidated.safetensors" in describe(open_checkpoint(model)).warnings[0]


def test_shards_without_index_and_no_weights_at_all(model: Path, sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert refused(sharded).code == "missing_index"
    (model / WEIGHTS).unlink()
    assert refused(model).code == "no_weights"
    save_file({}, model / WEIGHTS, {"format": "pt"})
    assert refused(model).code == "no_weights"


def test_a_wrong_total_size_is_a_warning(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["metadata"].update(total_size=5))
    assert "5 bytes" in describe(open_checkpoint(sharded)).warnings[0]


def test_missing_tensors_are_named(model: Path) -> None:
    edit_tensors(model, lambda tensors: [tensors.pop("model.norm.weight"), tensors.pop("lm_head.weight")])
    error = refused(model)
    assert error.code == "missing_tensor"
    assert "model.norm.weight" in error.message
    assert "lm_head.weight" in error.message


def test_a_tensor_of_another_shape(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(47, 32)}))
    error = refused(model)
    assert (error.code, error.param) == ("wrong_shape", "model.layers.1.mlp.up_proj.weight")
    assert "[47, 32]" in error.message
    assert "[48, 32]" in error.message


def test_a_configuration_that_asks_for_endless_blocks(model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(num_hidden_layers=2**30))
    assert refused(model).code == "missing_tensor"


def test_unexpected_tensors_block_and_old_buffers_warn(model: Path) -> None:
    extra = {"model.mtp.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    edit_tensors(model, lambda tensors: tensors.update(extra))
    facts = describe(open_checkpoint(model))
    assert [(blocker.code, blocker.param) for blocker in facts.blockers] == [("unexpected_tensor", "model.mtp.weight")]
    assert "inv_freq" in facts.warnings[0]


def test_a_stored_copy_of_a_tied_head_is_counted_once(tied: Path) -> None:
    before = describe(open_checkpoint(tied))
    edit_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    after = describe(open_checkpoint(tied))
    assert after.parameters == before.parameters
    assert after.blockers == ()
    assert after.tied_head
    assert "lm_head.weight" in after.warnings[0]
    assert "copy" in after.warnings[0]


def test_a_tied_head_that_differs_is_kept_and_reported(tied: Path) -> None:
    for change in (lambda weight: weight + 1, lambda weight: weight.half()):
        edit_tensors(
            tied, lambda t, change=change: t.update({"lm_head.weight": change(t["model.embed_tokens.weight"])})
        )
        facts = describe(open_checkpoint(tied))
        assert facts.blockers == ()
        assert not facts.tied_head
        assert facts.parameters == sum(tensor.numel() for tensor in load_file(tied / WEIGHTS).values())
        assert "another matrix" in facts.warnings[0]
    edit_tensors(tied, lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}))
    assert refused(tied).code == "wrong_shape"


def test_integer_weights_block_and_mixed_dtypes_warn(model: Path) -> None:
    edit_tensors(model, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    facts = describe(open_checkpoint(model))
    assert [blocker.code for blocker in facts.blockers] == ["unsupported_dtype"]
    assert "F32, I8" in facts.warnings[0]
