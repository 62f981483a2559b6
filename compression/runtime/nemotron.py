"""Llama with MLP widths per block, under NVIDIA's configuration for such models (`nemotron-nas`, block_configs).

Tensor names are Llama's and attention is Llama's own; only the MLPs differ in width. vLLM and llama.cpp have native
classes for this form (DeciLM, `deci`); transformers has none, so this one is registered with its Auto classes.

Blocks without attention or with a linear in its place, which the form allows, are refused: nothing here makes them.
"""

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from compression.runtime.blocks import resize_mlp_
from preflight.families import table

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"


def block_configs(widths: Sequence[int], query_heads_per_group: int) -> list[dict[str, Any]]:
    """The configuration's list for these MLP widths, one entry per block."""
    return [
        {
            "attention": {"n_heads_in_group": query_heads_per_group, "no_op": False, "replace_with_linear": False},
            "ffn": {"intermediate_size": width, "no_op": False, "replace_with_linear": False},
        }
        for width in widths
    ]


def mlp_widths(configs: Sequence[Any]) -> tuple[int, ...]:
    """MLP width of each block.

    Raises:
        ValueError: a block without attention or MLP, or with a width that is not a number.
    """
    widths = []
    for index, config in enumerate(configs):
        attention, mlp = config["attention"], config["ffn"]
        odd = [part for part in (attention, mlp) if part.get("no_op") or part.get("replace_with_linear")]
        width = mlp.get("intermediate_size")
        if odd or not isinstance(width, int) or width < 1:
            raise ValueError(
                f"block_configs[{index}] has no attention, no MLP or no ffn.intermediate_size; such models cannot be "
                "loaded here"
            )
        widths.append(width)
    return tuple(widths)


class ModepressDeciLMConfig(LlamaConfig):
    """Llama's configuration with `block_configs`."""

    model_type = MODEL_TYPE


class ModepressDeciLMForCausalLM(LlamaForCausalLM):
    """Llama whose MLPs have the widths of `config.block_configs`."""

    config_class = ModepressDeciLMConfig

    def __init__(self, config: Any) -> None:
        """Build the stock model, then narrow its MLPs."""
        super().__init__(config)
        family, settings = table("llama"), config.to_dict()
        for block, width in zip(self.model.layers, mlp_widths(config.block_configs), strict=True):
            resize_mlp_(block, family, settings, width)
