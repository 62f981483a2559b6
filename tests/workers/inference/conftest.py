"""Tiny models in memory and on disk, and a real inference process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.tiny_models import make_tiny_model, make_tiny_tokenizer, random_model
from tests.workers.inference.server import InferenceServer
from workers.inference.loading import load, plan_load
from workers.inference.registry import ModelSource

EOS = 2


def never_ending(folder: Path) -> Path:
    """Make a tiny model that, taken greedily, never writes its end token and has room for a million tokens."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][EOS] = 0.0  # the likeliest of 384 logits is above 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1_000_000}))
    return folder


def make_full_layout(folder: Path) -> Path:
    """Write a random model in layout `full`: each block has widths of its own, values narrower than keys."""
    make_tiny_tokenizer(folder)
    shapes = [
        {"mlp_width": 40, "query_key_rank": 6, "value_output_rank": 4},
        {"mlp_width": 24, "query_key_rank": 8, "value_output_rank": 7},
    ]
    config = AutoConfig.for_model(
        "modepress_llama",
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
        block_shapes=shapes,
    )
    model = random_model(config)
    with torch.no_grad():
        for block, shape in zip(model.model.layers, shapes, strict=True):
            pairs = block.self_attn.rotary_pairs
            pairs.copy_(torch.arange(shape["query_key_rank"] // 2).expand_as(pairs))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Folders of tiny models by name; read-only by agreement."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: make_tiny_model(root / name, name) for name in ("llama", "mistral", "qwen2")}
    folders["bare"] = make_tiny_model(root / "bare", seed=3, chat_template=False)
    folders["endless"] = never_ending(make_tiny_model(root / "endless", seed=4))
    folders["full"] = make_full_layout(root / "full")
    return folders


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folders):
    """The same models in memory."""
    return {name: load(plan_load(ModelSource(name, folder, 1.0))) for name, folder in tiny_folders.items()}


@pytest.fixture(scope="module")
def server(tiny_folders, tmp_path_factory):
    """A running process that knows all tiny models; one request may wait."""
    with InferenceServer(tmp_path_factory.mktemp("home"), MODEPRESS_INFERENCE_MAX_WAITING="1") as running:
        for name, folder in tiny_folders.items():
            running.register(name, folder)
        yield running


@pytest.fixture
def copy_of(tiny_folders, tmp_path):
    """Return a function that copies a tiny model's folder, to be damaged."""
    return lambda name: Path(shutil.copytree(tiny_folders[name], tmp_path / f"copy-of-{name}"))
