"""Which checkpoints read images, and which of them the inference process can serve with their images.

Known from config.json alone: transformers, which has the classes, is not here.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from preflight.composite_rows import REDUCED

# Compared with transformers' own generate(), token by token, by tests/workers/inference/test_vision_models.py.
TESTED = (
    "artgpt4",
    "gemma3",
    "idefics2",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "minigpt4",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
    "tinygptv",
    "vipllava",
)
# Decoders that read images as embeddings in their prompt: what the token loop asks of a model, but no test runs them.
UNTESTED = (
    "aya_vision",
    "glm4v",
    "got_ocr2",
    "granite4_vision",
    "lighton_ocr",
    "ovis2",
    "paddleocr_vl",
    "qwen3_vl_moe",
)
_SEQUENCES = "an encoder beside its decoder"
# Served as well; their processors exist for torchvision alone, so they read images only where it was installed.
NEEDS_TORCHVISION = ("cohere2_vision", "lfm2_vl", "mistral3")
# Their answers are searched as a whole, not written token by token; frames need no processor's files. Tested by
# tests/workers/inference/test_video_answers.py.
SEARCHED = ("mplug2",)
# These read images too, and cannot be served with them: the model type has …
NOT_SERVED = {
    "blip": _SEQUENCES,
    "florence2": _SEQUENCES,
    "mllama": "images by cross-attention in each step",
    "pix2struct": _SEQUENCES,
}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
VISION_PART = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder)\.")


def _kind(config: Mapping[str, Any]) -> str:
    """The stock model type: layout `full` of some has a class of its own, made from the stock one."""
    return str(config.get("model_type")).removeprefix(REDUCED)


def has_vision(config: Mapping[str, Any]) -> bool:
    """Whether a model has a part that sees."""
    return isinstance(config.get("vision_config"), Mapping)


def searches_answers(config: Mapping[str, Any]) -> bool:
    """Whether a model's answers are searched as a whole: from frames, and a question where it takes one."""
    return _kind(config) in SEARCHED


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether the inference process serves this checkpoint with its images (given a processor)."""
    return searches_answers(config) or (has_vision(config) and _kind(config) in (*TESTED, *UNTESTED))


def loads_with_vision(config: Mapping[str, Any]) -> bool:
    """Whether the inference process loads a checkpoint with its vision tower, whatever becomes of its processor."""
    return reads_images(config) or (has_vision(config) and _kind(config) in NEEDS_TORCHVISION)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model: a part of their own in most vision-language configurations."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def has_processor(files: Sequence[str]) -> bool:
    """Whether a folder with these files says how an image becomes numbers."""
    return any(name in files for name in PROCESSOR_FILES)


def why_no_images(config: Mapping[str, Any]) -> str | None:
    """Why a model with a part that sees is served without it; None for all others."""
    if not has_vision(config) or loads_with_vision(config):
        return None
    name = _kind(config)
    reason = f"has {NOT_SERVED[str(name)]}" if name in NOT_SERVED else "is not among the types that chat knows"
    return f"model_type {name!r} {reason}"


def image_warnings(config: Mapping[str, Any], files: Sequence[str]) -> tuple[str, ...]:
    """Say in plain words what will and what will not work with this checkpoint's images; nothing for text models."""
    name = _kind(config)
    if searches_answers(config):
        takes = "frames and one question" if config.get("task") == "question" else "frames alone"
        return (f"it can be served: chat takes one message with {takes}",)
    if not has_vision(config):
        return ()
    if (why := why_no_images(config)) is not None:
        return (f"images are refused in chat: {why}",)
    if not reads_images(config):
        return (f"chat takes images only where torchvision is installed: the processor of a {name} needs it",)
    if not has_processor(files):
        return (f"images are refused in chat: no {' or '.join(PROCESSOR_FILES)} in the folder; push them too",)
    tested = "" if name in TESTED else f"; model_type {name!r} is served by transformers' classes and untested here"
    return (f"it can be served: chat takes text and images{tested}",)
