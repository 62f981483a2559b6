"""Causal language models whose blocks differ in width: one class per family, registered with the Auto classes.

The stock class is inherited and only the parts that shrank are replaced, so masks, caches, generation, tied heads and
loading stay the library's own. `model_type` is `modepress_<family>`; `config.block_shapes` lists the widths. Stock
vision-language models make their decoder by AutoModel of `text_config`: so a narrowed one fits into them as it is.
"""

from typing import Any, ClassVar

import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compression.runtime.attention import ReducedAttention
from compression.runtime.blocks import family_of, reduced_model_type, resize_block_
from compression.runtime.nemotron import ModepressDeciLMConfig, ModepressDeciLMForCausalLM
from preflight.families import known_families, table


class _Reduced:
    """Mixed into a stock model, with a head or without: resizes its blocks after the stock constructor has run.

    (mypy sees `object` above this class; what follows in every class made from it is a stock model.)
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        blocks = self.base_model.get_submodule(  # type: ignore[attr-defined]
            family_of(config).blocks.removeprefix(f"{self.base_model_prefix}.")  # type: ignore[attr-defined]
        )
        for block, shape in zip(blocks, config.block_shapes, strict=True):
            resize_block_(block, shape)

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, ReducedAttention):
            return  # rotary_pairs is stored; a missing key is an error at load, never an invention
        super()._init_weights(module)  # type: ignore[misc]


def _make(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    stock_model: type[PreTrainedModel] = getattr(transformers, table(family).architecture)
    title = stock_model.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    config = type(
        f"Modepress{title}Config",
        (stock_model.config_class,),
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
    decoder = type(
        f"Modepress{title}Model",
        (_Reduced, MODEL_MAPPING[stock_model.config_class]),
        {"config_class": config, "__doc__": f"{title} in layout full, without a head.", "__module__": __name__},
    )
    return config, model, decoder


REDUCED = {family: _make(family) for family in known_families()}


def register() -> None:
    """Make the Auto classes know the reduced families; safe to call twice."""
    for config, model, decoder in REDUCED.values():
        _register(config, model)
        AutoModel.register(config, decoder, exist_ok=True)
    _register(ModepressDeciLMConfig, ModepressDeciLMForCausalLM)


def _register(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
