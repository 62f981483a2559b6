"""How an artifact's configuration says that its linears are packed: compressed-tensors, format `pack-quantized`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from api_schemas.methods import GridConfig
from preflight.composites import Placed


def pack_quantized_settings(
    step: GridConfig, head: str, kept: Sequence[str] = (), placed: Placed | None = None
) -> dict[str, Any]:
    """The `quantization_config` that transformers and vLLM read.

    Args:
        step: bits and groups.
        head: name of the decoder's head, which is never packed.
        kept: linears of blocks that stay as they are, by their names in memory.
        placed: where the decoder stands among other parts; none of theirs is packed.
    """
    whole = None if placed is None else placed.composite
    parts = [] if whole is None else [f"re:.*{re.escape(word)}.*" for word in (*whole.vision, *whole.projector)]
    weights = {
        "num_bits": step.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if step.group_size is None else "group",
        "group_size": step.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [head if whole is None else f"re:.*{head}$", *parts, *kept],
        "kv_cache_scheme": None,
    }


def packed_bits(settings: Mapping[str, Any] | None) -> int | None:
    """The bits of a code that a `quantization_config` of this format names; None for others, and without one."""
    if not settings or settings.get("format") != "pack-quantized":
        return None
    group: Mapping[str, Any] = next(iter(settings["config_groups"].values()))
    return int(group["weights"]["num_bits"])
