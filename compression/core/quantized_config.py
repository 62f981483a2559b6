"""How an artifact's configuration says in which form its linears are packed, and what a reader takes from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from api_schemas.methods import Int8Config, Nf4Config, QuantizationConfig
from compression.core.pack_quantized import pack_quantized_settings
from preflight.composites import Placed
from preflight.quantized_linears import BlockLinear

BITSANDBYTES = "bitsandbytes"


def quantization_settings(
    step: QuantizationConfig, linears: Sequence[BlockLinear], head: str, placed: Placed | None
) -> dict[str, Any]:
    """The `quantization_config` that transformers reads.

    Args:
        step: the quantisation.
        linears: all linears of the blocks, those that are kept too.
        head: name of the decoder's head, which is never packed.
        placed: where the decoder stands among other parts; none of theirs is packed.
    """
    kept = [one.in_memory for one in linears if one.kept_by]
    if not isinstance(step, Int8Config | Nf4Config):
        return pack_quantized_settings(step, head, kept, placed)
    whole = None if placed is None else placed.composite
    parts = [] if whole is None else [f".*{word.rstrip('.')}" for word in (*whole.vision, *whole.projector)]
    return {
        "quant_method": BITSANDBYTES,
        "load_in_8bit": isinstance(step, Int8Config),
        "load_in_4bit": isinstance(step, Nf4Config),
        "llm_int8_skip_modules": [head, *kept, *parts],
        "llm_int8_threshold": float(step.outlier_threshold) if isinstance(step, Int8Config) else 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": isinstance(step, Nf4Config) and step.double_quantization,
        "bnb_4bit_compute_dtype": step.compute_dtype if isinstance(step, Nf4Config) else "float32",
        "bnb_4bit_quant_storage": "uint8",
    }


def is_bitsandbytes(settings: Mapping[str, Any] | None) -> bool:
    """Whether linears are loaded as codes and stay codes while the model runs."""
    return bool(settings) and settings is not None and settings.get("quant_method") == BITSANDBYTES


def outlier_threshold(settings: Mapping[str, Any] | None) -> float | None:
    """The threshold under which LLM.int8's kernels round a model's inputs; None where inputs are not rounded."""
    if settings is None or not is_bitsandbytes(settings) or not settings.get("load_in_8bit"):
        return None
    return float(settings.get("llm_int8_threshold", 6.0))
