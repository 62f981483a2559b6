"""What a damaged folder leads to: a named error, never a model with invented weights."""

import json

import pytest
from safetensors.torch import load_file, save_file

from api_schemas.errors import InvalidCheckpoint
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource
from workers.inference.sampling import SamplingDefaults


def load_folder(folder):
    return load(plan_load(ModelSource("damaged", folder, 1.0)))


def code_of(folder):
    with pytest.raises(InvalidCheckpoint) as caught:
        load_folder(folder)
    return caught.value.code


def test_facts_that_the_token_loop_needs(tiny_loaded):
    loaded = tiny_loaded["llama"]
    assert loaded.context_length == 512
    assert loaded.vocabulary == 384
    assert loaded.eos_ids == {2}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_missing_folder(tmp_path):
    with pytest.raises(InvalidCheckpoint):
        load_folder(tmp_path / "gone")


def test_missing_weights_are_not_made_up(copy_of):
    folder = copy_of("full")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.rotary_pairs"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert code_of(folder) == "missing_weights"


def test_a_configuration_transformers_cannot_build(copy_of):
    folder = copy_of("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "no_such_function"}))
    assert code_of(folder) == "model_load_failed"


def test_no_tokenizer(copy_of):
    folder = copy_of("llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert code_of(folder) == "tokenizer_missing"


def test_a_generation_config_with_a_wrong_value(copy_of):
    folder = copy_of("llama")
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    assert code_of(folder) == "invalid_generation_config"


def test_sampling_values_and_end_tokens_of_the_generation_config(copy_of):
    folder = copy_of("llama")
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": [7, 9]}))
    loaded = load_folder(folder)
    assert loaded.defaults == SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    assert loaded.eos_ids == {2, 7, 9}
