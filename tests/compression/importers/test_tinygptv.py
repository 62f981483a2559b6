"""TinyGPT-V: every published form of its files becomes a model that computes what the authors' program computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

import compression.runtime  # noqa: F401 (registers the model)
from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import TinyGptvImport
from compression.core.processors import still_processor
from compression.importers.chat_files import CLIP_MEAN, CLIP_STD, MARK, TEMPLATES
from compression.importers.ledger import read_ledger
from compression.importers.phi_base import rows_by_head
from compression.importers.sanity import TEXT, TOKENS, noise_warning
from compression.importers.tinygptv import convert
from compression.runtime.tinygptv import TinyGptvConfig, TinyGptvForConditionalGeneration
from preflight.checkpoint import describe, open_checkpoint
from tests.compression.importers.tinygptv_originals import BLOCKS, HEADS, TinyGptv, write_originals
from tests.image_chat_originals import IMAGE, QUERIES, Originals
from tests.tiny_vision_models import picture

BEFORE, AFTER = torch.tensor([7, 301, 12, 90]), torch.tensor([55, 8, 240, 33, 121])


def _request(originals: Originals, **options: Any) -> TinyGptvImport:
    paths = {role: str(path) for role, path in originals.paths.items()}
    return TinyGptvImport.model_validate({"family": "tinygptv", **paths, **originals.options, **options})


def _imported(folder: Path, originals: Originals, **options: Any) -> Path:
    convert(_request(originals, **options), folder)
    return folder


def _load(folder: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def _pixels(seed: int, size: int = IMAGE) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: Any, pixels: Tensor) -> Tensor:
    marks = torch.full((QUERIES,), model.config.image_token_id)
    tokens = torch.cat([BEFORE, marks, AFTER])[None]
    found: Tensor = model(input_ids=tokens, pixel_values=pixels).logits[0]
    return found


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def stage3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Originals, Path]:
    folder = tmp_path_factory.mktemp("stage3")
    originals = write_originals(folder)
    return originals, _imported(folder / "model", originals)


FORMS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2, "final_norm": False},
    {"stage": 3},
    {"stage": 3, "layout": "split"},
    {"stage": 3, "layout": "mixformer"},
    {"stage": 3, "peft": "0.3"},
    {"stage": 4, "own_q_former": True},
    {"stage": 4, "layout": "split", "peft": "0.3"},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(f"{key}={value}" for key, value in form.items()))
def test_every_published_form_computes_what_the_authors_program_does(tmp_path: Path, form: dict[str, Any]) -> None:
    originals = write_originals(tmp_path, **form)
    size = 2 * IMAGE if form["stage"] == 4 else IMAGE  # stage 4 reads larger pictures: positions are resized
    model = _load(_imported(tmp_path / "model", originals, image_size=size))
    pixels = _pixels(1, size)
    wanted = TinyGptv(originals.state).logits(BEFORE, pixels, AFTER)
    assert _distance(_logits(model, pixels), wanted) < 1e-5


@torch.no_grad()
def test_pictures_as_the_decoder_reads_them(stage3: tuple[Originals, Path]) -> None:
    originals, folder = stage3
    model, run = _load(folder), TinyGptv(originals.state)
    pixels = torch.cat([_pixels(1), _pixels(2)])
    assert _distance(model.image_inputs(pixels), run.pictures(pixels)) < 1e-5
    assert _distance(_logits(model, pixels[1:]), run.logits(BEFORE, pixels[:1], AFTER)) > 1e-2
    with pytest.raises(ValueError, match="5 places for images, and 10 inputs"):
        _logits(model, pixels)


def _without_rms_norm(model: Any) -> None:
    for block in model.language_model.model.layers:
        block.post_layernorm = nn.Identity()


def _blocks_of_rows(model: Any) -> None:
    """Rows as if they lay part by part: what a loader does that does not know of the heads."""
    for block in model.language_model.model.layers:
        attention = block.self_attn
        apart = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        by_head = torch.stack([w.unflatten(0, (HEADS, -1)) for w in apart], dim=1).flatten(0, 2)
        for linear, rows in zip((attention.q_proj, attention.k_proj, attention.v_proj), by_head.chunk(3), strict=True):
            linear.weight.data = rows


def _stock_norm_after_the_vit(model: Any) -> None:
    model.vision_model.post_layernorm.eps = 1e-1


def _key_bias(model: Any) -> None:
    for layer in model.vision_model.encoder.layers:
        query, _, value = layer.self_attn.qkv.bias.chunk(3)
        layer.self_attn.qkv.bias.data = torch.cat([query, value, value * 0])


@pytest.mark.parametrize("spoil", [_without_rms_norm, _blocks_of_rows, _stock_norm_after_the_vit, _key_bias])
def test_a_model_with_one_detail_wrong_is_told_apart(
    stage3: tuple[Originals, Path], spoil: Callable[[Any], None]
) -> None:
    originals, folder = stage3
    model = _load(folder)
    with torch.no_grad():
        spoil(model)
    assert _distance(_logits(model, _pixels(1)), TinyGptv(originals.state).logits(BEFORE, _pixels(1), AFTER)) > 1e-3


def test_answers_with_a_cache_are_those_without(stage3: tuple[Originals, Path]) -> None:
    model = _load(stage3[1])
    tokens = torch.cat([BEFORE, torch.full((QUERIES,), model.config.image_token_id), AFTER])[None]
    answer = model.generate(input_ids=tokens, pixel_values=_pixels(1), max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        whole = model(input_ids=answer, pixel_values=_pixels(1)).logits[0]
    start = tokens.shape[1]
    assert torch.equal(whole[start - 1 : -1].argmax(-1), answer[0, start:])


def test_the_record_accounts_for_every_file_and_says_what_was_saved(stage3: tuple[Originals, Path]) -> None:
    originals, folder = stage3
    record = read_ledger(folder)
    assert (record["importer"], record["stage"], record["language_layout"]) == ("tinygptv", 3, "fused")
    names = {role: set(torch.load(_file(path), weights_only=True)) for role, path in originals.paths.items()}
    for role in ("q_former", "delta"):
        names[role] = set(torch.load(originals.paths[role], weights_only=True)["model"])
    everything = {f"{role}:{name}" for role, found in names.items() for name in found}
    used = {key for made in record["targets"].values() for key in made["from"]}
    dropped = [key for rule in record["dropped"].values() for key in rule["keys"]]
    assert used | set(dropped) == everything
    assert not used & set(dropped)
    saved = {one["what"]: one["bytes"] for one in record["savings"]}
    trained = sum(
        t.numel() * 4 for t in torch.load(originals.paths["delta"])["model"].values() if t.is_floating_point()
    )
    assert saved["optimizer_state"] == 2 * trained
    assert saved["adapters_merged"] == 4 * BLOCKS * (4 * 64 + 192 * 4 + 4 * 64 + 64 * 4)
    assert saved["projections_folded"] == 4 * (48 * 40 + 40 + 40 * 64 + 64 - 48 * 64 - 64)
    assert {"text_branch", "other_heads", "unused_vision"} <= saved.keys()
    assert record["bytes"]["written"] < record["bytes"]["read"]


def _file(path: Path) -> Path:
    return path / "pytorch_model.bin" if path.is_dir() else path


def test_a_decoder_that_guesses_is_told_from_one_that_knows(stage3: tuple[Originals, Path]) -> None:
    _, folder = stage3
    record = read_ledger(folder)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:TOKENS]])
    with torch.no_grad():
        wanted = _load(folder)(input_ids=tokens, labels=tokens).loss
    assert record["text_loss"]["nats_per_token"] == pytest.approx(float(wanted), rel=1e-4)
    assert any(warning.startswith("answers_like_noise:") for warning in record["warnings"])  # its weights are random
    assert noise_warning(2.8, 51200) is None
    assert noise_warning(9.0, 51200) is not None


def test_a_trained_q_former_wins_over_that_of_blip2(tmp_path: Path) -> None:
    folder = _imported(tmp_path / "model", write_originals(tmp_path, stage=4, own_q_former=True))
    record = read_ledger(folder)
    assert record["targets"]["query_tokens"]["from"] == ["delta:query_tokens"]
    assert "q_former:query_tokens" in record["dropped"]["replaced_by_delta"]["keys"]
    assert record["targets"]["vision_model.post_layernorm.weight"]["from"] == ["q_former:ln_vision.weight"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_pieces_around_the_picture(tmp_path: Path, name: str) -> None:
    folder = _imported(tmp_path / "model", write_originals(tmp_path), template=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = still_processor(folder, tokenizer)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "[vqa] what colour is it?"}]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.count(MARK) == 1
    inputs = processor(images=[[picture(3)]], text=[text], return_tensors="pt")
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(MARK)]
    config = json.loads((folder / "config.json").read_text())
    marks = [config["image_token_index"]] * QUERIES
    assert inputs["input_ids"][0].tolist() == pieces[0] + marks + pieces[1]
    expected = np.asarray(picture(3).convert("RGB").resize((IMAGE, IMAGE), Image.Resampling.BICUBIC)) / 255
    expected = (expected - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert np.abs(inputs["pixel_values"][0].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_what_the_service_sees(stage3: tuple[Originals, Path]) -> None:
    checkpoint = open_checkpoint(stage3[1])
    facts = describe(checkpoint)
    assert facts.modality == "image-text"
    assert facts.has_chat_template
    assert facts.dtype == "F32"
    assert "import_ledger.json" in checkpoint.side_files


def test_real_sizes_on_the_meta_device() -> None:
    text = {"model_type": "tinygptv_phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 51200}  # fmt: skip
    with torch.device("meta"):
        model = TinyGptvForConditionalGeneration(TinyGptvConfig(text_config=text, vision_config={"image_size": 448}))
    language = sum(p.numel() for p in model.language_model.parameters())
    assert language == 2_779_683_840 + 32 * (4 * 80 + 2560)  # the fused copy's size on the hub, and the delta's norms
    assert model.vision_model.embeddings.position_embedding.shape == (1, 1025, 1408)
    assert model.language_projection.weight.shape == (2560, 768)


def test_rows_by_head_undoes_the_fusion() -> None:
    parts = [torch.arange(8.0) + 100 * part for part in range(3)]  # 4 heads of 2 channels
    fused = torch.stack([part.view(4, 2) for part in parts], dim=1).reshape(-1)
    for part, wanted in enumerate(parts):
        assert torch.equal(rows_by_head(fused, 4, part), wanted)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, inside: bool = True) -> None:
    content = torch.load(path, weights_only=True)
    change(content["model"] if inside else content)
    torch.save(content, path)


Spoil = Callable[[Originals], dict[str, Any] | None]


def _rename_in_delta(originals: Originals) -> None:
    name = "llama_model.base_model.model.model.layers.1.self_attn.q_layernorm.weight"
    _rewrite(originals.paths["delta"], lambda state: state.update({name.replace("q_lay", "Q_lay"): state.pop(name)}))


def _norms_missing(originals: Originals) -> None:
    def drop(state: dict[str, Any]) -> None:
        for name in [name for name in state if "post_layernorm" in name]:
            del state[name]

    _rewrite(originals.paths["delta"], drop)


def _half_an_adapter(originals: Originals) -> None:
    name = "llama_model.base_model.model.model.layers.0.self_attn.dense.lora_A.weight"
    _rewrite(originals.paths["delta"], lambda state: state.pop(name))


def _adapter_elsewhere(originals: Originals) -> None:
    name = "llama_model.base_model.model.model.layers.0.mlp.fc1.lora_A.weight"
    _rewrite(originals.paths["delta"], lambda state: state.update({name: torch.ones(4, 64)}))


def _two_forms_of_one(originals: Originals) -> None:
    name = "llama_model.base_model.model.model.layers.0.self_attn.dense.lora_A."
    _rewrite(originals.paths["delta"], lambda s: s.update({f"{name}default.weight": s[f"{name}weight"]}))


def _no_q_former(originals: Originals) -> None:
    name = "Qformer.bert.encoder.layer.1.output_query.dense.weight"
    _rewrite(originals.paths["q_former"], lambda state: state.pop(name))


def _unknown_in_vision(originals: Originals) -> None:
    _rewrite(originals.paths["vision"], lambda s: s.update({"blocks.0.gamma_1": torch.ones(32)}), inside=False)


def _no_positions(originals: Originals) -> None:
    _rewrite(originals.paths["vision"], lambda state: state.pop("pos_embed"), inside=False)


def _other_base(originals: Originals) -> None:
    torch.save({"model.layers.0.self_attn.o_proj.weight": torch.ones(2, 2)}, _file(originals.paths["language"]))


def _wider_base(originals: Originals) -> None:
    def widen(state: dict[str, Any]) -> None:
        state["model.embed_tokens.weight"] = torch.ones(400, 128)

    _rewrite(_file(originals.paths["language"]), widen, inside=False)


def _cut(originals: Originals) -> None:
    path = originals.paths["delta"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 20])


def _nan(originals: Originals) -> None:
    _rewrite(originals.paths["delta"], lambda state: state["llama_proj.bias"].fill_(torch.nan))


def _no_stage(originals: Originals) -> None:
    originals.paths["delta"] = originals.paths["delta"].rename(originals.paths["delta"].with_name("delta.pth"))


def _no_tokenizer(originals: Originals) -> None:
    for path in originals.paths["language"].glob("tokenizer*"):
        path.unlink()


def _told(**options: Any) -> Spoil:
    return lambda _: options


WRONG: list[tuple[Spoil, str, str]] = [
    (_rename_in_delta, "missing_tensor", "llama_model.model.layers.1.self_attn.q_layernorm.weight"),
    (_norms_missing, "missing_tensor", "llama_model.model.layers.0.post_layernorm.weight"),
    (_half_an_adapter, "missing_tensor", "model.layers.0.self_attn.dense.lora_A.weight"),
    (_adapter_elsewhere, "missing_tensor", "model.layers.0.mlp.fc1.lora_B.weight"),
    (_two_forms_of_one, "duplicate_tensor", "self_attn.dense.lora_A.weight"),
    (_no_q_former, "missing_tensor", "qformer.encoder.layer.1.output_query.dense.weight"),
    (_unknown_in_vision, "unexpected_tensor", "blocks.0.gamma_1"),
    (_no_positions, "missing_tensor", "pos_embed"),
    (_other_base, "wrong_base", "language"),
    (_wider_base, "wrong_base", "language"),
    (_cut, "truncated_file", "TinyGPT-V_for_Stage3.pth"),
    (_nan, "non_finite_weights", "llama_proj.bias"),
    (_told(stage=1), "stage_mismatch", "stage"),
    (_no_stage, "stage_unknown", "stage"),
    (_told(image_size=30), "invalid_image_size", "image_size"),
    (_told(q_former_heads=7), "invalid_heads", "q_former_heads"),
    (_no_tokenizer, "tokenizer_missing", "language"),
]


@pytest.mark.parametrize(("spoil", "code", "param"), WRONG, ids=[f"{code}-{param}" for _, code, param in WRONG])
def test_what_is_wrong_with_the_files_is_named(tmp_path: Path, spoil: Spoil, code: str, param: str) -> None:
    originals = write_originals(tmp_path)
    options = spoil(originals) or {}
    with pytest.raises(InvalidCheckpoint) as caught:
        convert(_request(originals, **options), tmp_path / "model")
    error = caught.value
    assert error.code == code, error.message
    assert param in str(error.param), error.param
    assert not (tmp_path / "model").exists()
