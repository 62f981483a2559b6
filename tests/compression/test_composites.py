"""Decoders among other parts: walked as stock code runs them, written in place, everything around them untouched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import compression.runtime  # noqa: F401 (registers the reduced decoders)
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from compression.core.artifact import Result, write_artifact
from compression.core.processors import still_processor
from compression.core.protocols import NullSink
from compression.core.streamed_model import StreamedModel
from compression.pipeline import compress
from compression.reload import logits_of
from preflight.checkpoint import describe, open_checkpoint
from preflight.composite_rows import COMPOSITES
from preflight.families import resolve, table
from preflight.shapes import dense_shape
from tests.compression.walks import expected_logits, random_tokens, step, walk
from tests.picture_rows import mixed_rows, picture, write_rows
from tests.tiny_composites import IMAGE, IMAGE_TOKEN, KINDS, make_tiny_composite, respell
from tests.tiny_models import make_tiny_model

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llava", "llama", {"kv_heads": 2, "tied": True}),
    ("llava", "llama", {"kv_heads": 1, "head_dim": 10, "attention_bias": True}),
    ("llava", "mistral", {"kv_heads": 4, "sliding_window": 7}),
    ("llava", "qwen2", {"kv_heads": 2}),
    ("llava", "qwen3", {"kv_heads": 2}),
    ("llava", "granite", {"kv_heads": 1, "tied": True}),
    ("vipllava", "llama", {"kv_heads": 4}),
    ("llava_next", "mistral", {"kv_heads": 2}),
    ("llava_next", "granite", {"kv_heads": 2, "tied": True}),
    ("llava_onevision", "qwen2", {"kv_heads": 2, "tied": True}),
    ("internvl", "qwen2", {"kv_heads": 1}),
    ("internvl", "qwen3", {"kv_heads": 2, "tied": True}),
    ("mistral3", "mistral", {"kv_heads": 2}),
    ("idefics2", "mistral", {"kv_heads": 1, "tied": True}),
    ("qwen2_vl", "qwen2_vl_text", {"kv_heads": 2, "tied": True}),
    ("qwen2_5_vl", "qwen2_5_vl_text", {"kv_heads": 1}),
    ("qwen3_vl", "qwen3_vl_text", {"kv_heads": 2, "tied": True}),
    ("qwen3_vl", "qwen3_vl_text", {"kv_heads": 1, "attention_bias": True}),
    ("gemma3", "gemma3_text", {"kv_heads": 2, "tied": True}),
    ("gemma3", "gemma3_text", {"kv_heads": 1, "final_logit_softcapping": 2.0}),
    ("idefics3", "llama", {"kv_heads": 2}),
    ("smolvlm", "llama", {"kv_heads": 1, "tied": True}),
]


def stock(folder: Path) -> Any:
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def picture_and_words(folder: Path) -> dict[str, torch.Tensor]:
    """Words, an image, words, as the model's own processor makes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if AutoConfig.from_pretrained(folder).model_type == "mistral3":  # its processor asks for torchvision
        words, image = random_tokens(1, 12)[0], torch.full((4,), IMAGE_TOKEN)
        pixels = torch.randn(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))
        tokens = torch.cat((words[:6], image, words[6:]))[None]
        return {"input_ids": tokens, "pixel_values": pixels, "image_sizes": torch.tensor([[IMAGE, IMAGE]])}
    processor = still_processor(folder, tokenizer)
    kind = AutoConfig.from_pretrained(folder).model_type.removeprefix("modepress_")
    text = f"The quick {KINDS[kind].mark} fox jumps over the lazy dog"
    return dict(processor(images=[picture(1)], text=[text], add_special_tokens=False, return_tensors="pt"))


def seen(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What stock code tells block 0, and its logits, for an image among words."""
    told: list[torch.Tensor] = []
    model = stock(folder)
    decoder = getattr(model.model, "language_model", None) or model.model.text_model
    handle = decoder.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: told.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        logits = model(**picture_and_words(folder)).logits[0]
    handle.remove()
    return told[0], logits


def streamed(folder: Path) -> StreamedModel:
    decoder = open_checkpoint(folder).decoder
    return StreamedModel(folder, resolve(decoder.config), decoder.tensors)


def side(folder: Path) -> tuple[str, ...]:
    return open_checkpoint(folder).side_files


def whole_shapes(folder: Path) -> tuple[BlockShape, ...]:
    config = open_checkpoint(folder).decoder.config
    return (dense_shape(resolve(config), config),) * resolve(config).block_count(config)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "decoder", "settings"), CASES)
def test_the_walk_is_stock_code_on_image_embeddings_and_on_text(
    tmp_path: Path, kind: str, decoder: str, settings: dict[str, Any]
) -> None:
    folder = make_tiny_composite(tmp_path, kind, decoder, **settings)
    model, ours = stock(folder), streamed(folder)
    hidden, logits = seen(folder)
    tokens = picture_and_words(folder)["input_ids"]
    pictured = tokens == IMAGE_TOKEN
    torch.testing.assert_close(ours.embed(tokens)[~pictured], hidden[~pictured])
    assert pictured.any()
    assert not torch.isclose(ours.embed(tokens)[pictured], hidden[pictured]).all(dim=-1).any()
    hidden = hidden.clone()
    for index in range(ours.blocks):
        hidden = ours.forward(ours.block(index, ours.block_state(index)), hidden, index)
    with ours.head() as head:
        walked = torch.isclose(head(hidden[0]), logits, rtol=1e-4, atol=1e-4)
    assert bool(walked.all()) != bool(COMPOSITES[kind].blind)
    tokens = random_tokens(1, 24)
    torch.testing.assert_close(logits_of(ours, tokens), model(tokens).logits[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["full", "portable"])
@pytest.mark.parametrize(("kind", "decoder", "settings"), CASES)
def test_nothing_removed_is_nothing_changed_and_the_other_parts_are_the_same_bytes(
    tmp_path: Path, kind: str, decoder: str, settings: dict[str, Any], layout: str
) -> None:
    folder, target = make_tiny_composite(tmp_path / "m", kind, decoder, **settings), tmp_path / "a"
    shapes = whole_shapes(folder)
    done = walk(folder, step(layout=layout), random_tokens(4, 32), shapes=shapes)
    write_artifact(Result(done.model, done.config, side(folder), done.store, shapes, layout), target, {})
    before, after = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    extra = {name for name in after if name.endswith("rotary_pairs")}
    assert after.keys() - extra == before.keys()
    assert bool(extra) == (layout == "full")
    assert done.model.placed is not None
    for name in done.model.placed.others:
        assert torch.equal(before[name], after[name])
    torch.testing.assert_close(seen(target)[1], seen(folder)[1], rtol=1e-4, atol=1e-4)


NARROWED = [  # the plan refuses the other: tests/preflight/test_composites.py
    (*case, layout)
    for case in CASES
    for layout in ("full", "portable")
    if (case[0], layout) != ("idefics2", "portable")
]


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "decoder", "settings", "layout"), NARROWED)
def test_a_narrowed_decoder_is_that_of_the_text_model_alone(
    tmp_path: Path, kind: str, decoder: str, settings: dict[str, Any], layout: str
) -> None:
    """The same weights as a checkpoint of their own, compressed on the same tokens: the same blocks, to the bit."""
    folder = make_tiny_composite(tmp_path / "m", kind, decoder, **settings)
    asked, tokens = step(layout=layout), random_tokens(4, 32)
    done = walk(folder, asked, tokens)
    if table(decoder).alone:
        alone = make_tiny_model(tmp_path / "t", decoder, tokenizer=False, **_as_text(settings))  # type: ignore[arg-type]
        save_decoder(folder, alone)
        apart = walk(alone, asked, tokens)
        for index, kept in done.store.results.items():
            for name, tensor in apart.store.results[index].state.items():
                assert torch.equal(tensor, kept.state[name])
    result = Result(done.model, done.config, side(folder), done.store, done.method.shapes, layout)
    write_artifact(result, tmp_path / "a", {})
    written = stock(tmp_path / "a")
    expected = expected_logits(done.model, done.method, done.store, tokens[:1])
    torch.testing.assert_close(written(tokens[:1]).logits[0], expected, rtol=1e-4, atol=1e-4)
    pictured = picture_and_words(folder)["input_ids"] == IMAGE_TOKEN
    assert torch.equal(seen(tmp_path / "a")[0][pictured], seen(folder)[0][pictured])


def _as_text(settings: dict[str, Any]) -> dict[str, Any]:
    return {"bias" if name == "attention_bias" else name: value for name, value in settings.items()}


def save_decoder(folder: Path, target: Path) -> None:
    """Put a composite's decoder into the folder of a text model, under the names of the text model."""
    whole = open_checkpoint(folder)
    assert whole.placed is not None
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name: stored[whole.placed.disk_name(name)] for name in whole.decoder.tensors},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    (target / "config.json").write_text(json.dumps(whole.decoder.config))


def job(**more: Any) -> Recipe:
    text = {"num_samples": 4, "sequence_length": 64}
    return Recipe.model_validate(
        {
            "steps": [{"method": "modegpt", "sparsity": 0.3, "round_to": 8}],
            "calibration": text,
            "evaluation": {"num_windows": 2, "sequence_length": 64, "generation_tokens": 2},
            **more,
        }
    )


def run(recipe: Recipe, source: Path, target: Path) -> Any:
    blocks = target.with_name(f"{target.name}-blocks")
    return compress(
        recipe, source, target, model="m", blocks=blocks, progress=NullSink(), files={}, roots=None, hub_offline=True
    )


STEPS: list[list[dict[str, Any]]] = [
    [{"method": "modegpt", "sparsity": 0.3, "round_to": 8, "mode": "reference"}],
    [{"method": "modegpt", "sparsity": 0.3, "round_to": 8, "layout": "full"}],
    [
        {"method": "modegpt", "sparsity": 0.3, "round_to": 32, "modules": ["mlp"]},
        {"method": "gptq", "bits": 8, "group_size": 32},
    ],
    [{"method": "round_to_nearest", "bits": 8, "group_size": 32}],
]


JOBS = [*(("llava", steps) for steps in STEPS), ("gemma3", STEPS[2]), ("qwen3_vl", STEPS[1])]


@pytest.mark.parametrize(("kind", "steps"), JOBS)
def test_a_whole_job_writes_a_model_that_loads(tmp_path: Path, kind: str, steps: list[dict[str, Any]]) -> None:
    """The pipeline's own proof loads `portable` in a process that cannot import this project."""
    folder = make_tiny_composite(tmp_path / "m", kind, COMPOSITES[kind].decoder, intermediate=96)
    report = run(job(steps=steps), folder, tmp_path / "a")
    stocks = "with compression.runtime" if steps[0].get("layout") == "full" else "stock transformers, without"
    assert stocks in report.reload.loader
    assert any(warning.startswith("text_only_calibration:") for warning in report.warnings)
    written = open_checkpoint(tmp_path / "a")
    assert written.config["model_type"].removeprefix("modepress_") == kind
    weights = [entry.bytes for name, entry in written.tensors.items() if not name.endswith("rotary_pairs")]
    assert report.steps[-1].bytes.after == sum(weights)
    assert report.parameters.after == report.plan.parameters_after or not report.plan.shapes_final
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert written.placed is not None
    assert all(torch.equal(before[name], after[name]) for name in written.placed.others)
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in (tmp_path / "a").iterdir()}
    assert describe(written).parameters > 0


def test_blocks_go_whole_from_a_decoder_too(tmp_path: Path) -> None:
    folder = respell(
        make_tiny_composite(tmp_path / "m", layers=3, tied=True),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    steps = [{"method": "modegpt", "sparsity": 0.4, "round_to": 8, "remove_blocks": 1}]
    report = run(job(steps=steps), folder, tmp_path / "a")
    written = open_checkpoint(tmp_path / "a")
    assert len(report.removed_blocks) == 1
    assert written.config["text_config"]["num_hidden_layers"] == 2
    assert any(name.startswith("model.language_model.layers.1.") for name in written.tensors)
    assert not any(name.startswith("model.language_model.layers.2.") for name in written.tensors)


def test_a_job_calibrated_on_images_says_what_it_saw(tmp_path: Path) -> None:
    """All walks see them: prices, both streams, and the quantisation after."""
    folder = make_tiny_composite(tmp_path / "m", "idefics3", intermediate=96)
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(40))
    text = {"source": "file", "path": str(rows), "num_samples": 8, "sequence_length": 64}
    steps = [
        {"method": "modegpt", "sparsity": 0.3, "round_to": 32, "layout": "full", "modules": ["mlp"]},
        {"method": "gptq", "bits": 8, "group_size": 32},
    ]
    seen = run(job(steps=steps, calibration={**text, "image_field": "image"}), folder, tmp_path / "seen")
    unseen = run(job(steps=steps, calibration=text), folder, tmp_path / "unseen")
    use = seen.calibration
    assert use.images > 3
    assert use.image_tokens == 4 * use.images
    assert use.tokens_used == 8 * 64
    assert (unseen.calibration.images, unseen.calibration.image_tokens) == (0, 0)
    assert any(one.startswith("judged_on_text:") for one in seen.warnings)
    blocks = [(report.blocks[-1].relative_output_error, report.blocks[0].block_influence) for report in (seen, unseen)]
    assert blocks[0] != blocks[1]


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["full", "portable"])
def test_a_flat_configuration_stays_flat(tmp_path: Path, layout: str) -> None:
    """Qwen2-VL's releases have the decoder's values beside the whole's."""
    folder = make_tiny_composite(tmp_path / "m", "qwen2_vl", "qwen2_vl_text")
    nested = json.loads((folder / "config.json").read_text())
    text = nested.pop("text_config")
    flat = {**text, **nested}
    (folder / "config.json").write_text(json.dumps(flat))
    tokens = random_tokens(4, 32)
    torch.testing.assert_close(
        logits_of(streamed(folder), tokens[:1]), stock(folder)(tokens[:1]).logits[0], rtol=1e-4, atol=1e-4
    )
    done = walk(folder, step(layout=layout), tokens)
    result = Result(done.model, done.config, side(folder), done.store, done.method.shapes, layout)
    write_artifact(result, tmp_path / "a", {})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "text_config" not in config
    assert config["vision_config"] == flat["vision_config"]
    expected = expected_logits(done.model, done.method, done.store, tokens[:1])
    torch.testing.assert_close(stock(tmp_path / "a")(tokens[:1]).logits[0], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "decoder"), [("llava", "llama"), ("qwen2_vl", "qwen2_vl_text"), ("gemma3", "gemma3_text")]
)
def test_an_artifact_in_layout_full_streams_as_it_runs_and_is_not_compressed_again(
    tmp_path: Path, kind: str, decoder: str
) -> None:
    folder, target, tokens = make_tiny_composite(tmp_path / "m", kind, decoder), tmp_path / "a", random_tokens(4, 32)
    done = walk(folder, step(layout="full"), tokens)
    write_artifact(Result(done.model, done.config, side(folder), done.store, done.method.shapes, "full"), target, {})
    again = StreamedModel(target, done.model.family)
    torch.testing.assert_close(logits_of(again, tokens[:1]), stock(target)(tokens[:1]).logits[0], rtol=1e-4, atol=1e-4)
    assert again.parameters == sum(one.numel() for one in stock(target).parameters())
    facts = describe(open_checkpoint(target))
    assert facts.modality == "image-text"
    assert "unsupported_architecture" in {blocker.code for blocker in facts.blockers}
