"""What makes a family of vision-language models itself, in small: configurations as on the hub, a dozen tokens."""

from collections.abc import Callable
from typing import Any

TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
MARK = "<image>"

Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str], str]


def _llava() -> Parts:
    side = {"height": 32, "width": 32}
    config = {
        "text": {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_id": MARK,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": side}
    return config, processor, preprocessor | PLAIN, [MARK], MARK


def _idefics3(name: str = "Idefics3", vision_type: str = "idefics3_vision") -> Parts:
    config = {
        "text": {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": vision_type},
        "image_token_id": MARK,
        "scale_factor": 2,
    }
    processor = {"processor_class": f"{name}Processor", "image_seq_len": 4}
    preprocessor = {
        "image_processor_type": f"{name}ImageProcessor",
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
    }
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<fake_token_around_image>", MARK, "<end_of_utterance>", "<global-img>", *rows]
    return config, processor, preprocessor | PLAIN, special, MARK


def _smolvlm() -> Parts:
    config, processor, preprocessor, special, mark = _idefics3("SmolVLM", "smolvlm_vision")
    preprocessor |= {"video_sampling": {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}}}
    return config, processor, preprocessor, special, mark


def _qwen2_vl(name: str = "Qwen2VL", vision: dict[str, Any] | None = None) -> Parts:
    pad = "<|image_pad|>"
    depth = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = {
        "text": {"rope_parameters": rope},
        "vision_config": (vision or depth) | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "image_token_id": pad,
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 256,
        "max_pixels": 1600,
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    special = [pad, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    mark = f"<|vision_start|>{pad}<|vision_end|>"
    return config, {"processor_class": f"{name}Processor"}, preprocessor | PLAIN, special, mark


def _qwen2_5_vl() -> Parts:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen2_vl("Qwen2_5_VL", vision)


def _gemma3() -> Parts:
    config = {
        "text": {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_id": "<image_soft_token>",
        "boi_token_id": "<start_of_image>",
        "eoi_token_id": "<end_of_image>",
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    preprocessor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}}
    special = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    return config, processor, preprocessor | PLAIN, special, "<start_of_image>"


def _llava_next() -> Parts:
    config, processor, preprocessor, special, mark = _llava()
    config |= {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "image_seq_length": 16}
    processor |= {"processor_class": "LlavaNextProcessor"}
    preprocessor |= {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
    }
    return config, processor, preprocessor, special, mark


def _llava_onevision() -> Parts:
    grid = [[32, 64], [64, 32], [64, 64]]
    config = {
        "text": {"model_type": "qwen2"},
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_id": MARK,
        "video_token_id": "<video>",
        "image_grid_pinpoints": grid,
        "vision_aspect_ratio": "anyres_max_4",
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    }
    size = {"height": 32, "width": 32}
    preprocessor = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": size, "image_grid_pinpoints": grid}
    return config, processor, preprocessor | PLAIN, [MARK, "<video>"], MARK


def _internvl() -> Parts:
    tower = TOWER | {"image_size": [32, 32], "patch_size": [8, 8], "norm_type": "layer_norm"}
    config = {
        "text": {"model_type": "qwen2"},
        "vision_config": tower,
        "image_token_id": "<IMG_CONTEXT>",
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    preprocessor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 32, "width": 32},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 4,
    }
    special = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    return config, processor, preprocessor | PLAIN, special, "<IMG_CONTEXT>"


def _mistral3() -> Parts:
    config = {
        "text": {"model_type": "mistral", "head_dim": 8},
        "vision_config": TOWER | {"model_type": "pixtral", "image_size": 64, "head_dim": 12},
        "image_token_id": "[IMG]",
        "spatial_merge_size": 2,
    }
    processor = {"processor_class": "PixtralProcessor", "patch_size": 8, "spatial_merge_size": 2}
    preprocessor = {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 64},
        "patch_size": {"height": 16, "width": 16},
    }
    return config, processor, preprocessor | PLAIN, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"], "[IMG]"


def _paligemma() -> Parts:
    config = {
        "text": {"model_type": "gemma", "head_dim": 8},
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        "image_token_id": MARK,
        "projection_dim": 32,
    }
    size = {"height": 32, "width": 32}
    preprocessor = {"image_processor_type": "SiglipImageProcessor", "size": size, "image_seq_length": 16}
    return config, {"processor_class": "PaliGemmaProcessor"}, preprocessor | PLAIN, [MARK], MARK


def _qwen3_vl() -> Parts:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config, processor, preprocessor, special, mark = _qwen2_vl("Qwen3VL", vision)
    config["text"] = {**config["text"], "head_dim": 8}
    return config, processor, preprocessor, special, mark


def _vipllava() -> Parts:
    config, processor, preprocessor, special, mark = _llava()
    config = {key: value for key, value in config.items() if not key.startswith("vision_feature")}
    config["vision_feature_layers"] = [-2, -1]
    return config, processor, preprocessor, special, mark


def _idefics2() -> Parts:
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 1,
    }
    config = {
        "text": {"model_type": "mistral", "head_dim": 8},
        "vision_config": TOWER | {"model_type": "idefics2_vision"},
        "perceiver_config": perceiver,
        "image_token_id": MARK,
    }
    processor = {"processor_class": "Idefics2Processor", "image_seq_len": 4}
    preprocessor = {
        "image_processor_type": "Idefics2ImageProcessor",
        "size": {"shortest_edge": 24, "longest_edge": 32},
        "do_image_splitting": False,
    }
    return config, processor, preprocessor | PLAIN, ["<fake_token_around_image>", MARK, "<end_of_utterance>"], MARK


NAMED_TOKENS = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "paligemma": {"image_token": MARK},
}


def _image_chat(text: dict[str, Any]) -> Parts:
    side = {"height": 28, "width": 28}
    config = {
        "text": {"bos_token_id": 1, **text},
        "vision_config": TOWER | {"image_size": 28, "patch_size": 14},
        "qformer_config": {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "num_query_tokens": 3,
        "image_token_index": "<ImageHere>",
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<ImageHere>",
        "patch_size": 28,
        "num_additional_image_tokens": 2,
        "vision_feature_select_strategy": "full",
    }
    preprocessor = {"image_processor_type": "BlipImageProcessor", "size": side}
    return config, processor, preprocessor | PLAIN, ["<ImageHere>"], "<ImageHere>"


def _tinygptv() -> Parts:
    return _image_chat({"model_type": "tinygptv_phi", "num_key_value_heads": 4})


def _minigpt4() -> Parts:
    return _image_chat({"model_type": "llama"})


def _artgpt4() -> Parts:
    return _image_chat({"model_type": "artgpt4_llama", "adapter_size": 8})


FAMILIES: dict[str, Callable[[], Parts]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
    "idefics2": _idefics2,
    "internvl": _internvl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "qwen3_vl": _qwen3_vl,
    "vipllava": _vipllava,
    "tinygptv": _tinygptv,
    "minigpt4": _minigpt4,
    "artgpt4": _artgpt4,
}
