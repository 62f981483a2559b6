"""ArtGPT-4, MiniGPT-4 and MiniGPT-v2: their files become models that compute what the authors' programs compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import compression.runtime  # noqa: F401 (registers the models)
from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import ArtGpt4Import, MiniGpt4Import
from compression.importers import artgpt4, minigpt4
from compression.importers.ledger import read_ledger
from compression.importers.llama_base import check_version
from compression.runtime.artgpt4 import ArtGpt4Config, ArtGpt4ForConditionalGeneration
from tests.compression.importers.artgpt4_originals import VOCABULARY, ImageChat, write_originals
from tests.image_chat_originals import IMAGE, PATCH, QUERIES, Originals

BEFORE, AFTER = torch.tensor([7, 301, 12, 90]), torch.tensor([55, 8, 240, 33, 121])


def _convert(folder: Path, originals: Originals, **options: Any) -> Path:
    paths = {role: str(path) for role, path in originals.paths.items()}
    asked = {**paths, **originals.options, **options}
    if originals.paths["delta"].stem == "artgpt4":
        artgpt4.convert(ArtGpt4Import.model_validate({"family": "artgpt4", **asked}), folder)
    else:
        minigpt4.convert(MiniGpt4Import.model_validate({"family": "minigpt4", **asked}), folder)
    return folder


def _load(folder: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def _pixels(seed: int, size: int = IMAGE) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: Any, pixels: Tensor, inputs: int = QUERIES) -> Tensor:
    tokens = torch.cat([BEFORE, torch.full((inputs,), model.config.image_token_id), AFTER])[None]
    found: Tensor = model(input_ids=tokens, pixel_values=pixels).logits[0]
    return found


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("form", ["artgpt4-code", "artgpt4-post", "minigpt4-q_former"])
def test_with_a_q_former(tmp_path: Path, form: str) -> None:
    originals = write_originals(tmp_path, form)
    model = _load(_convert(tmp_path / "model", originals))
    wanted = ImageChat(originals.state).logits(BEFORE, _pixels(1), AFTER)
    assert _distance(_logits(model, _pixels(1)), wanted) < 1e-5
    assert _distance(_logits(model, _pixels(2)), wanted) > 1e-2


@pytest.mark.parametrize("form", ["minigpt4-joined", "minigpt4-v2"])
def test_with_joined_patches(tmp_path: Path, form: str) -> None:
    originals = write_originals(tmp_path, form)
    size = 4 * PATCH  # 16 patches, 4 inputs of the decoder; positions are resized from 2 x 2
    model = _load(_convert(tmp_path / "model", originals, image_size=size))
    wanted = ImageChat(originals.state).logits(BEFORE, _pixels(1, size), AFTER)
    assert _distance(_logits(model, _pixels(1, size), inputs=4), wanted) < 1e-5


def _without_bottleneck(model: Any) -> None:
    for block in model.language_model.model.layers:
        block.adapter = nn.Identity()


def _bottleneck_without_residual(model: Any) -> None:
    for block in model.language_model.model.layers:
        down, up = block.adapter.down, block.adapter.up
        block.adapter = nn.Sequential(down, nn.GELU(), up)


def _bottleneck_on_what_the_mlp_reads(model: Any) -> None:
    for block in model.language_model.model.layers:
        block.post_attention_layernorm = nn.Sequential(block.adapter, block.post_attention_layernorm)
        block.adapter = nn.Identity()


@pytest.mark.parametrize(
    "spoil", [_without_bottleneck, _bottleneck_without_residual, _bottleneck_on_what_the_mlp_reads]
)
def test_a_bottleneck_elsewhere_is_told_apart(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    originals = write_originals(tmp_path, "artgpt4-code")
    model = _load(_convert(tmp_path / "model", originals))
    spoil(model)
    assert _distance(_logits(model, _pixels(1)), ImageChat(originals.state).logits(BEFORE, _pixels(1), AFTER)) > 1e-3


def test_whatever_norms_the_file_has_are_taken(tmp_path: Path) -> None:
    for form, count in (("artgpt4-code", 3), ("artgpt4-post", 2)):
        folder = tmp_path / form
        folder.mkdir()
        record = read_ledger(_convert(folder / "model", write_originals(folder, form)))
        assert record["trained_norms"] == count
        norms = [name for name in record["dropped"]["replaced_by_delta"]["keys"] if name.endswith("layernorm.weight")]
        assert len(norms) == count
        assert (
            "delta:llama_model.model.layers.0.self_attn.0.rotary_emb.inv_freq"
            in record["dropped"]["recomputed"]["keys"]
        )


def test_a_token_for_pictures_without_a_row_to_spare(tmp_path: Path) -> None:
    originals = write_originals(tmp_path, "minigpt4-q_former")
    state = torch.load(originals.paths["language"] / "pytorch_model.bin", weights_only=True)
    rows = 384  # of the tokenizer
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = state[name][:rows].clone()
    torch.save(state, originals.paths["language"] / "pytorch_model.bin")
    config = originals.paths["language"] / "config.json"
    config.write_text(config.read_text().replace(str(VOCABULARY), str(rows)))
    folder = _convert(tmp_path / "model", originals)
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["image_token"] == "<|endoftext|>"  # which stands for unknown text here, and is never written
    assert json.loads((folder / "config.json").read_text())["image_token_index"] < rows


def test_real_sizes_on_the_meta_device() -> None:
    text = {"model_type": "artgpt4_llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "vocab_size": 32001}  # fmt: skip
    with torch.device("meta"):
        model = ArtGpt4ForConditionalGeneration(ArtGpt4Config(text_config=text))
    bottlenecks = [p for name, p in model.named_parameters() if ".adapter." in name]
    assert sum(p.numel() for p in bottlenecks) == 524_544_000  # two thirds of three times that is the authors' file
    assert sum(p.numel() for p in model.language_model.parameters()) == 13_015_874_560 + 524_544_000


def test_versions_are_told_apart_by_their_rows() -> None:
    check_version("vicuna", 32001, 5120, q_former=True)
    check_version("llama", 32000, 4096, q_former=False)
    check_version("tiny", 50, 64, q_former=True)
    with pytest.raises(InvalidCheckpoint, match="Vicuna v0, merged with") as caught:
        check_version("vicuna-1.5", 32000, 5120, q_former=True)
    assert caught.value.code == "wrong_base"


def _rewrite(path: Path, change: Callable[[dict[str, Any]], Any], wrapper: str | None = None) -> None:
    content = torch.load(path, weights_only=True)
    change(content if wrapper is None else content[wrapper])
    torch.save(content, path)


def _unmerged(originals: Originals) -> None:
    def shrink(state: dict[str, Any]) -> None:
        for tensor in state.values():
            tensor.mul_(1e-3)

    _rewrite(originals.paths["language"] / "pytorch_model.bin", shrink)


def _another_row(originals: Originals) -> None:
    config = originals.paths["language"] / "config.json"
    config.write_text(config.read_text().replace(str(VOCABULARY), str(VOCABULARY + 1)))


def _not_a_llama(originals: Originals) -> None:
    torch.save({"transformer.wte.weight": torch.ones(2, 2)}, originals.paths["language"] / "pytorch_model.bin")


def _other_width(originals: Originals) -> None:
    _rewrite(originals.paths["delta"], lambda s: s.update({"llama_proj.weight": torch.ones(72, 48)}), "model")


def _no_projection(originals: Originals) -> None:
    _rewrite(originals.paths["delta"], lambda state: state.pop("llama_proj.weight"), "model")


def _one_bottleneck_missing(originals: Originals) -> None:
    _rewrite(originals.paths["delta"], lambda s: s.pop("llama_model.model.layers.1.self_attn.1.up.bias"), "model")


def _deeper(originals: Originals) -> None:
    name = "llama_model.model.layers.2.self_attn.1.up.bias"
    _rewrite(originals.paths["delta"], lambda s: s.update({name: torch.ones(64)}), "model")


def _mini_as_art(originals: Originals) -> None:
    def drop(state: dict[str, Any]) -> None:
        for name in [name for name in state if ".self_attn.1." in name]:
            del state[name]

    _rewrite(originals.paths["delta"], drop, "model")


def _cut(originals: Originals) -> None:
    path = originals.paths["vision"]
    path.write_bytes(path.read_bytes()[:4000])


WRONG: list[tuple[Callable[[Originals], None], str, str]] = [
    (_unmerged, "unmerged_delta", "language"),
    (_another_row, "wrong_base", "language"),
    (_not_a_llama, "wrong_base", "language"),
    (_other_width, "wrong_base", "language"),
    (_no_projection, "missing_tensor", "llama_proj.weight"),
    (_one_bottleneck_missing, "missing_tensor", "llama_model.model.layers.1.self_attn.1.up.bias"),
    (_deeper, "unexpected_tensor", "llama_model.model.layers.2.self_attn.1.up.bias"),
    (_mini_as_art, "missing_tensor", "self_attn.1.down.weight"),
    (_cut, "truncated_file", "eva_vit_g.pth"),
]


@pytest.mark.parametrize(("spoil", "code", "param"), WRONG, ids=[spoil.__name__ for spoil, _, _ in WRONG])
def test_what_is_wrong_with_the_files_is_named(
    tmp_path: Path, spoil: Callable[[Originals], None], code: str, param: str
) -> None:
    originals = write_originals(tmp_path, "artgpt4-code")
    spoil(originals)
    with pytest.raises(InvalidCheckpoint) as caught:
        _convert(tmp_path / "model", originals)
    assert caught.value.code == code, caught.value.message
    assert param in str(caught.value.param), caught.value.param
    assert not (tmp_path / "model").exists()


def test_joined_patches_that_do_not_divide_are_named(tmp_path: Path) -> None:
    originals = write_originals(tmp_path, "minigpt4-joined")
    with pytest.raises(InvalidCheckpoint) as caught:
        _convert(tmp_path / "model", originals, image_size=3 * PATCH)
    assert (caught.value.code, caught.value.param) == ("wrong_shape", "llama_proj.weight")
