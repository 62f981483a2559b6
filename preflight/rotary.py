"""What a configuration says of rotary embedding and attention windows, under old and new keys."""

from collections.abc import Mapping
from typing import Any

STATIC_ROTARY = ("default", "linear", "llama3")  # frequencies that do not depend on the sequence's length
WINDOWS_IF_ABSENT = {"mistral": 4096}  # what the stock configuration class assumes; null means no window

WINDOW_IS_OPTIONAL = ("qwen2", "qwen3")  # there `use_sliding_window` decides


def rope_type(config: Mapping[str, Any]) -> str:
    """The rotary scaling type, under transformers' old and new configuration keys."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def is_portable_longrope(config: Mapping[str, Any]) -> bool:
    """Whether rotary settings are those that layout `portable` writes: the same factors at every length, no scale."""
    parameters = config.get("rope_parameters") or {}
    return (
        rope_type(config) == "longrope"
        and parameters.get("short_factor") == parameters.get("long_factor")
        and parameters.get("attention_factor") == 1.0
    )


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that attention sees back, where that is fewer than the model's whole context."""
    optional = config.get("model_type") in WINDOW_IS_OPTIONAL
    if optional and not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window", WINDOWS_IF_ABSENT.get(str(config.get("model_type"))))
    length = config.get("max_position_embeddings") or 0
    return int(window) if window and window < length else None
