"""Tiny random vision-language models with real tokenizer, image processor and chat template, written by transformers.

Each folder is what its family's folders on the hub look like, as far as serving reads it.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.tiny_models import make_tiny_tokenizer

VisionType = Literal["llava", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "gemma3"]
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
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
# The parts in their order, as the families' own templates do it.
TEMPLATE = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n{{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}}{{% else %}}{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}"
    "{mark}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def make_tiny_vision_model(folder: Path, model_type: VisionType = "llava", *, seed: int = 0) -> Path:
    """Write a random model of `model_type` with tokenizer, processor and template into `folder`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder)
    config_values, processor, preprocessor, special, mark = FAMILIES[model_type]()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE.format(mark=mark)
    tokenizer.save_pretrained(folder)
    _name_tokens(folder, NAMED_TOKENS.get(model_type, {}))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    text = TEXT | {"vocab_size": len(tokenizer)} | config_values.pop("text", {})
    named = {key: _ids(tokenizer, value) for key, value in config_values.items()}
    config = AutoConfig.for_model(model_type, text_config=text, tie_word_embeddings=False, **named)
    random_vision_model(config, seed).save_pretrained(folder)
    return folder


def random_vision_model(config: Any, seed: int = 0) -> Any:
    """Build a model with weights, norms and biases all away from their trivial start values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scales = name.endswith("weight") and "norm" in name
                parameter.normal_(1.0 if scales else 0.0, 0.1 if parameter.ndim == 1 else 0.3)
    model.generation_config.eos_token_id = 2
    return model.eval()


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return a picture of random colours in large squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file's bytes."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _name_tokens(folder: Path, names: dict[str, str]) -> None:
    """Tell the tokenizer under which names the family's processor asks for its tokens."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


def _ids(tokenizer: PreTrainedTokenizerFast, value: Any) -> Any:
    """Replace the name of a token by its id."""
    return tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) and value.startswith("<") else value


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


NAMED_TOKENS = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
}
FAMILIES: dict[str, Callable[[], Parts]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}
