"""How an artifact's configuration says in which form its linears are packed, and what a reader takes from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_schemas.methods import Int8Config, Nf4Config, QuantizationConfig, TinygptvConfig
from compression.core.pack_quantized import pack_quantized_settings
from preflight.code_budget import KEPT
from preflight.composites import Placed
from preflight.quantized_linears import BlockLinear

BITSANDBYTES = "bitsandbytes"
MIXED = "modepress_mixed"  # 8- and 4-bit codes side by side, which only `compression.runtime` loads


@dataclass(frozen=True)
class Bits:
    """Bits of every stored linear of the blocks by its path, and of the vision tower's linears; 16 is as they are.

    Attributes:
        blocks: by path on disk.
        tower: of those on disk that may be codes.
        tower_others: linears of the tower, by their names in memory, that stay whatever the tower gets.
    """

    blocks: Mapping[str, int]
    tower: int = KEPT
    tower_others: tuple[str, ...] = ()

    @property
    def kinds(self) -> frozenset[int]:
        """All numbers of bits that codes have."""
        return frozenset({*self.blocks.values(), self.tower}) - {KEPT}


def bits_of(step: QuantizationConfig, linears: Sequence[BlockLinear]) -> Bits:
    """The bits of a step that treats all linears alike."""
    if isinstance(step, TinygptvConfig):
        raise TypeError("tinygptv chooses bits by measurement")  # its caller has them
    return Bits({one.path: KEPT if one.kept_by else step.bits for one in linears})


def quantization_settings(
    step: QuantizationConfig, linears: Sequence[BlockLinear], bits: Bits, head: str, placed: Placed | None
) -> dict[str, Any]:
    """The `quantization_config` that transformers reads.

    Args:
        step: the quantisation.
        linears: all linears of the blocks, those that are kept too.
        bits: what each of them has got.
        head: name of the decoder's head, which is never packed.
        placed: where the decoder stands among other parts; none of theirs but the tower's is ever packed.
    """
    kept = [one.in_memory for one in linears if bits.blocks[one.path] == KEPT]
    if not isinstance(step, Int8Config | Nf4Config | TinygptvConfig):
        return pack_quantized_settings(step, head, kept, placed)
    whole = None if placed is None else placed.composite
    words = () if whole is None else whole.projector if bits.tower != KEPT else (*whole.vision, *whole.projector)
    skipped = [head, *kept, *(f".*{word.rstrip('.')}" for word in words)]
    if bits.tower != KEPT:
        skipped += bits.tower_others
    int8, nf4 = (step.int8, step.nf4) if isinstance(step, TinygptvConfig) else (step, step)
    common = {
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": float(int8.outlier_threshold) if isinstance(int8, Int8Config) else 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": isinstance(nf4, Nf4Config) and nf4.double_quantization,
        "bnb_4bit_compute_dtype": nf4.compute_dtype if isinstance(nf4, Nf4Config) else "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
    if len(bits.kinds) > 1:
        eights = [one.in_memory for one in linears if bits.blocks[one.path] == 8]
        tower = [f".*{word.rstrip('.')}" for word in whole.vision] if whole and bits.tower == 8 else []
        return {"quant_method": MIXED, **common, "int8_modules": [*eights, *tower]}
    eight = 4 not in bits.kinds
    return {"quant_method": BITSANDBYTES, "load_in_8bit": eight, "load_in_4bit": not eight, **common}


def is_bitsandbytes(settings: Mapping[str, Any] | None) -> bool:
    """Whether linears are loaded as codes and stay codes while the model runs."""
    return settings is not None and settings.get("quant_method") in (BITSANDBYTES, MIXED)


def outlier_threshold(settings: Mapping[str, Any] | None) -> float | None:
    """The threshold under which LLM.int8's kernels round a model's inputs; None where inputs are not rounded."""
    if settings is None or not is_bitsandbytes(settings):
        return None
    if not settings.get("load_in_8bit") and settings["quant_method"] != MIXED:
        return None
    return float(settings.get("llm_int8_threshold", 6.0))
