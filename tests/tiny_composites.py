"""Tiny vision-language models of stock classes with a real processor, the same bytes on every run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.tiny_models import PECULIARITIES, make_tiny_tokenizer

IMAGE, PATCH = 28, 14  # four patches an image
IMAGE_TOKEN = 384  # after the 384 of the tokenizer
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
SIDES = {"height": IMAGE, "width": IMAGE}
TILES = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]


class Kind(NamedTuple):
    """What makes a composite itself: its configuration, its processor's files, and how a text marks an image."""

    config: dict[str, Any]
    processor: dict[str, Any]
    pictures: dict[str, Any]
    named_tokens: dict[str, str] | None = None
    mark: str = "<image>"


def _llava(name: str, config: dict[str, Any] | None = None, **pictures: Any) -> Kind:
    processor = {
        "processor_class": f"{name}Processor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    sizes = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": IMAGE}, "crop_size": SIDES}
    whole = {"vision_config": CLIP, "image_token_index": IMAGE_TOKEN, **(config or {})}
    return Kind(whole, processor, {**sizes, **pictures})


def _idefics(name: str) -> Kind:
    edge = {"longest_edge": IMAGE}
    pictures = {"image_processor_type": f"{name}ImageProcessor", "size": edge, "max_image_size": edge}
    return Kind(
        {"vision_config": TOWER, "image_token_id": IMAGE_TOKEN, "scale_factor": 1},
        {"processor_class": f"{name}Processor", "image_seq_len": 4},
        {**pictures, "do_image_splitting": False},
    )


def _qwen_vl(name: str, tower: dict[str, Any]) -> Kind:
    grid = {"patch_size": 4, "temporal_patch_size": 2}
    marks = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 385, "vision_end_token_id": 386}
    return Kind(
        {"vision_config": {**tower, **grid, "spatial_merge_size": 2}, "video_token_id": 387, **marks},
        {"processor_class": f"{name}Processor"},
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 256,
            "max_pixels": 784,
            "merge_size": 2,
            **grid,
        },
        {"image_token": "<image>", "video_token": "<video>"},
        "<break><image><end>",
    )


_TILED = {"image_grid_pinpoints": TILES}
KINDS: dict[str, Kind] = {
    "llava": _llava("Llava"),
    "vipllava": _llava("Llava", {"vision_feature_layer": [-1, -2]}),
    "llava_next": _llava("LlavaNext", _TILED, image_processor_type="LlavaNextImageProcessor", **_TILED),
    "llava_onevision": Kind(
        {"vision_config": {**TOWER, "model_type": "siglip_vision_model"}, "image_token_index": IMAGE_TOKEN, **_TILED},
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
        },
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": SIDES, **_TILED},
    ),
    "mistral3": Kind(
        {
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": IMAGE_TOKEN,
            "spatial_merge_size": 1,
        },
        {
            "processor_class": "PixtralProcessor",
            "patch_size": PATCH,
            "spatial_merge_size": 1,
            "image_token": "<image>",
            "image_break_token": "<break>",
            "image_end_token": "<end>",
        },
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": IMAGE}, "patch_size": PATCH},
    ),
    "internvl": Kind(
        {
            "vision_config": {
                **TOWER,
                "model_type": "internvl_vision",
                "image_size": [IMAGE] * 2,
                "patch_size": [7] * 2,
            },
            "image_token_id": IMAGE_TOKEN,
        },
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {"image_processor_type": "GotOcr2ImageProcessor", "size": SIDES, "max_patches": 2},
        {
            "context_image_token": "<image>",
            "start_image_token": "<break>",
            "end_image_token": "<end>",
            "video_token": "<video>",
        },
    ),
    "idefics2": Kind(
        {
            "vision_config": TOWER,
            "image_token_id": IMAGE_TOKEN,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
        },
        {"processor_class": "Idefics2Processor", "image_seq_len": 3},
        {"image_processor_type": "Idefics2ImageProcessor", "size": {"shortest_edge": 20, "longest_edge": IMAGE}},
    ),
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "qwen2_vl": _qwen_vl("Qwen2VL", {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen_vl(
        "Qwen2_5_VL",
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": _qwen_vl(
        "Qwen3VL",
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
    "gemma3": Kind(
        {
            "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE_TOKEN,
            "mm_tokens_per_image": 4,
        },
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {"image_processor_type": "Gemma3ImageProcessor", "size": SIDES},
        {"image_token": "<image>", "boi_token": "<break>", "eoi_token": "<end>"},
        "<break>",
    ),
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
DECODERS = {"qwen2_vl_text": MROPE, "qwen2_5_vl_text": MROPE, "qwen3_vl_text": MROPE, **PECULIARITIES}


def make_tiny_composite(
    folder: Path,
    kind: str = "llava",
    decoder: str = "llama",
    *,
    tied: bool = False,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 32,
    intermediate: int = 48,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Write a random model of several parts with its tokenizer into `folder`, and return the folder.

    Args:
        folder: where to write; made when absent.
        kind: `model_type` of the whole.
        decoder: `model_type` of its decoder.
        tied: whether the head is the embedding.
        kv_heads: key and value heads per block; 4 query heads share them.
        head_dim: channels per head.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        layers: decoder blocks.
        dtype: of all weights.
        seed: of the weights.
        more: further values of the decoder's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<break>", "<end>", "<video>"]})
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | (KINDS[kind].named_tokens or {})))
    (folder / "processor_config.json").write_text(json.dumps(KINDS[kind].processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(KINDS[kind].pictures))
    text = {
        "model_type": decoder,
        "vocab_size": 392,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
        **DECODERS.get(decoder, {}),
        **more,
    }
    config = AutoConfig.for_model(kind, text_config=text, tie_word_embeddings=tied, **KINDS[kind].config)
    random_composite(config, dtype, seed).save_pretrained(folder)
    return folder


def random_composite(config: object, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """Build the model of a configuration with all weights away from their trivial start values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scales = name.endswith("weight") and "norm" in name and parameter.ndim == 1
                parameter.normal_(1.0 if scales else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    return model.to(dtype).eval()


def respell(folder: Path, *renames: tuple[str, str]) -> Path:
    """Rename tensors on disk by prefix, as releases of other ages have them."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        new = next((to + name.removeprefix(at) for at, to in renames if name.startswith(at)), name)
        tensors[new] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
