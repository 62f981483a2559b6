"""What is written: stock-loadable portable folders, registered full ones, and nothing lost on the way."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression.core.artifact import Result, longrope, sane_generation, write_artifact
from compression.core.streamed_model import StreamedModel, tensors_of
from compression.evaluation import final_states
from compression.methods.modegpt_decompositions import keep_pairs
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.shapes import shapes_for
from tests.compression.kinds import CASES
from tests.compression.walks import Walk, expected_logits, random_tokens, step, walk
from tests.tiny_models import make_tiny_model

ALL = ["mlp", "query_key", "value_output"]


def write(done: Walk, folder: Path, target: Path, layout: str) -> dict[str, str]:
    side_files = open_checkpoint(folder).side_files
    result = Result(done.model, done.config, side_files, done.store, done.method.shapes, layout)
    return write_artifact(result, target, {"parent": "tiny"})


def portable_walk(folder: Path, **settings: object) -> Walk:
    """Layout portable with attention reduced: one shared subset of pairs, here not the first ones."""
    config = step(**{"layout": "portable", "modules": ALL, "round_to": 8, **settings})
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    shapes = shapes_for(family, checkpoint.config, config)
    head_dim = family.dimensions(checkpoint.config).head_dim
    scores = torch.rand(1, head_dim // 2, generator=torch.Generator().manual_seed(3))
    pairs = keep_pairs(scores, shapes[0].query_key_rank)[0]
    return walk(folder, config, random_tokens(8, 32), shared_pairs=pairs)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tied": True}),
        ("llama", {"kv_heads": 1, "bias": True, "head_dim": 12}),
        ("mistral", {}),
        ("qwen2", {}),
        ("granite", {"bias": True}),
        ("gemma2", {"tied": True}),
        ("mixtral", {}),
        ("smollm3", {"tied": True}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("smollm3", {"no_rope_layers": [0, 0]}),
    ],
)
def test_portable_with_reduced_attention_loads_in_stock_classes(tmp_path: Path, kind: str, settings: dict) -> None:
    """Invariant 7, T27, T34: √(r/d) and the longrope factors make the stock class compute the reduced model."""
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    done = portable_walk(folder)
    write(done, folder, tmp_path / "out", "portable")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config.head_dim == done.method.shapes[0].query_key_rank < done.method.size.head_dim
    tokens = random_tokens(1, 40, seed=9)
    with torch.inference_mode():
        got = model(tokens).logits[0]
    torch.testing.assert_close(got, expected_logits(done.model, done.method, done.store, tokens), rtol=1e-4, atol=1e-4)


def test_portable_reduced_attention_equals_the_original_scale(tmp_path: Path) -> None:
    """The folded query under stock scaling is the unfolded one under the original scaling."""
    folder = make_tiny_model(tmp_path / "in", "llama")
    portable = portable_walk(folder)
    pairs = portable.store.results[0].state["self_attn.rotary_pairs"][0]
    full = walk(
        folder,
        step(layout="full"),
        portable.tokens,
        shapes=portable.method.shapes,
        shared_pairs=pairs,
    )
    tokens = random_tokens(1, 40, seed=9)
    torch.testing.assert_close(
        expected_logits(portable.model, portable.method, portable.store, tokens),
        expected_logits(full.model, full.method, full.store, tokens),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_portable_with_narrower_mlps_loads_in_stock_classes(tmp_path: Path, kind: str, settings: dict) -> None:
    """What was parted or turned is written as the stock class stores it."""
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    done = walk(folder, step(layout="portable", sparsity=0.2, round_to=8), random_tokens(8, 32))
    assert done.method.shapes[0].mlp_width < done.method.size.mlp_width
    write(done, folder, tmp_path / "out", "portable")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(1, 40, seed=9)
    with torch.inference_mode():
        got = model(tokens).logits[0]
    torch.testing.assert_close(got, expected_logits(done.model, done.method, done.store, tokens), rtol=1e-4, atol=1e-4)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(folder).keys()


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_full_layout_reloads_through_the_auto_classes(tmp_path: Path, kind: str, settings: dict) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    done = walk(folder, step(layout="full"), random_tokens(8, 32))
    write(done, folder, tmp_path / "out", "full")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    streamed = StreamedModel(tmp_path / "out", done.model.family)
    tokens = random_tokens(1, 40, seed=9)
    with torch.inference_mode():
        got = model(tokens).logits[0]
        hidden = final_states(streamed, tokens, lambda _: None)
        with streamed.head() as head:
            torch.testing.assert_close(head(hidden)[0], got, rtol=1e-5, atol=1e-5)
        written = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        repeated = model(written).logits[0, 39:-1]
        repeated[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
        again = repeated.argmax(-1)
    torch.testing.assert_close(got, expected_logits(done.model, done.method, done.store, tokens), rtol=1e-5, atol=1e-5)
    assert written[0, 40:].tolist() == again.tolist()  # the cache holds narrower keys and values


def test_longrope_factors_turn_stock_frequencies_into_the_kept_ones() -> None:
    wanted = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    pairs = torch.tensor([0, 3, 6])
    settings = longrope(wanted, pairs, 10000.0, 128)
    stock = 10000.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    got = stock / torch.tensor(settings["short_factor"], dtype=torch.float64)
    torch.testing.assert_close(got, wanted[pairs])
    assert settings["attention_factor"] == settings["factor"] == 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_everything_beside_the_weights_survives(tmp_path: Path, tied: bool) -> None:
    """T01, T04, T05, T06: ties, metadata, tokenizer, template, generation settings; bytes are the tensors' own."""
    folder = make_tiny_model(tmp_path / "in", "llama", tied=tied)
    settings = {"do_sample": False, "temperature": 0.7, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    done = walk(folder, step(layout="portable"), random_tokens(4, 32))
    hashes = write(done, folder, tmp_path / "out", "portable")
    out = tmp_path / "out"
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata()["format"] == "pt"
        total = sum(file.get_tensor(name).numel() * file.get_tensor(name).element_size() for name in names)
    assert ("lm_head.weight" in names) is not tied
    assert (out / "model.safetensors").stat().st_size - total < 10_000
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert "auto_map" not in config
    assert "temperature" not in json.loads((out / "generation_config.json").read_text())
    chat = [{"role": "user", "content": "Hello."}]
    before, after = (AutoTokenizer.from_pretrained(where) for where in (folder, out))
    assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)
    assert set(hashes) == {path.name for path in out.iterdir()} - {"modepress.json"}
    assert not any(str(tmp_path) in path.read_text(errors="ignore") for path in out.iterdir())


def test_the_same_walk_written_twice_is_the_same_bytes(tmp_path: Path) -> None:
    """T22."""
    folder = make_tiny_model(tmp_path / "in", "llama")
    hashes = [
        write(walk(folder, step(layout="full"), random_tokens(4, 32)), folder, tmp_path / name, "full")
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1]


def test_dtype_on_disk_is_the_originals(tmp_path: Path) -> None:
    """T13."""
    folder = make_tiny_model(tmp_path / "in", "llama", dtype=torch.bfloat16)
    done = walk(folder, step(layout="portable"), random_tokens(4, 32))
    write(done, folder, tmp_path / "out", "portable")
    entries = open_checkpoint(tmp_path / "out").tensors
    assert {entry.dtype for entry in entries.values()} == {"BF16"}


def test_an_explicit_head_under_a_tie_flag_is_kept_where_it_differs(tmp_path: Path) -> None:
    """T02: dropping it would be a silent change of the model."""
    folder = make_tiny_model(tmp_path / "in", "llama", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    done = walk(folder, step(layout="portable"), random_tokens(4, 32))
    write(done, folder, tmp_path / "out", "portable")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in open_checkpoint(tmp_path / "out").tensors


def test_sampling_settings_stay_where_sampling_is_on() -> None:
    settings = {"do_sample": True, "temperature": 0.7}
    assert sane_generation(settings) == settings
