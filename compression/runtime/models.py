"""Causal language models whose blocks differ in width: one class per family, registered with the Auto classes.

The stock class is inherited and only the parts that shrank are replaced, so masks, caches, generation, tied heads and
loading stay the library's own. `model_type` is `modepress_<family>`; `config.block_shapes` lists the widths.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from compression.runtime.attention import ReducedAttention

STOCK: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def resize_block_(block: Any, shape: Mapping[str, int], scaling: float | None = None) -> None:
    """Replace the parts of a stock decoder block that `shape` narrows, uninitialised, in place.

    Args:
        block: a stock decoder layer of one of the families in `STOCK`.
        shape: `mlp_width`, `query_key_rank`, `value_output_rank`.
        scaling: of the attention logits; None keeps the original head size's.
    """
    attention, mlp = block.self_attn, block.mlp
    block.self_attn = ReducedAttention(attention, shape["query_key_rank"], shape["value_output_rank"])
    block.self_attn.scaling = attention.scaling if scaling is None else scaling
    width = shape["mlp_width"]
    mlp.gate_proj = _linear_like(mlp.gate_proj, mlp.gate_proj.in_features, width)
    mlp.up_proj = _linear_like(mlp.up_proj, mlp.up_proj.in_features, width)
    mlp.down_proj = _linear_like(mlp.down_proj, width, mlp.down_proj.out_features)


def _linear_like(old: Any, in_features: int, out_features: int) -> nn.Linear:
    """An uninitialised linear of other widths, with the old one's bias, dtype and device."""
    weight = old.weight
    return nn.Linear(in_features, out_features, bias=old.bias is not None, dtype=weight.dtype, device=weight.device)


class _Reduced:
    """Mixed into a stock causal language model: resizes its blocks after the stock constructor has run.

    (mypy sees `object` above this class; what follows in every class made from it is a stock model.)
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for block, shape in zip(self.model.layers, config.block_shapes, strict=True):  # type: ignore[attr-defined]
            resize_block_(block, shape)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ReducedAttention):
            return  # rotary_pairs is stored; a missing key is an error at load, never an invention
        super()._init_weights(module)  # type: ignore[misc]


def reduced_model_type(family: str) -> str:
    """The `model_type` of a family's layout `full`."""
    return f"modepress_{family}"


def _make(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    stock_config, stock_model = STOCK[family]
    title = stock_model.__name__.removesuffix("ForCausalLM")
    config = type(
        f"Modepress{title}Config",
        (stock_config,),
        {
            "model_type": reduced_model_type(family),
            "__doc__": f"{title} with widths per block.",
            "__annotations__": {"block_shapes": ClassVar[Any]},
            "__module__": __name__,
        },
    )
    model = type(
        f"Modepress{title}ForCausalLM",
        (_Reduced, stock_model),
        {"config_class": config, "__doc__": f"{title} in layout full.", "__module__": __name__},
    )
    return config, model


REDUCED = {family: _make(family) for family in STOCK}


def register() -> None:
    """Make the Auto classes know the reduced families; safe to call twice."""
    for config, model in REDUCED.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
