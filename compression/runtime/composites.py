"""Vision-language models with widths per block whose stock class makes its decoder by name.

Most stock classes make their decoder by AutoModel of `text_config`, and a narrowed one fits in (`models.py`). These do
not: the class of the whole is inherited, and its decoder's blocks are resized once it stands. `block_shapes` stands
beside the whole's values, and tensors have the names of the stock release.
"""

from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from compression.runtime.attention import ReducedAttention
from compression.runtime.blocks import resize_block_
from compression.runtime.tinygptv import TinyGptvForConditionalGeneration
from preflight.composite_rows import COMPOSITES, REDUCED, Composite, reduced_architecture

OURS: dict[str, Any] = {TinyGptvForConditionalGeneration.__name__: TinyGptvForConditionalGeneration}


class _ReducedWhole:
    """Mixed into a stock class of the whole: resizes the decoder's blocks after the stock constructor has run.

    (mypy sees `object` above this class; what follows in every class made from it is a stock model.)
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        composite = COMPOSITES[config.model_type.removeprefix(REDUCED)]
        blocks = self.get_submodule(f"{composite.decoder_in_memory}.layers")  # type: ignore[attr-defined]
        for block, shape in zip(blocks, config.block_shapes, strict=True):
            resize_block_(block, shape)

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, ReducedAttention):
            return  # rotary_pairs is stored; a missing key is an error at load, never an invention
        super()._init_weights(module)  # type: ignore[misc]


def register() -> None:
    """Make the Auto classes know them; safe to call twice."""
    for composite in COMPOSITES.values():
        if composite.fixed_decoder:
            _register(composite)


def _register(composite: Composite) -> None:
    stock = OURS.get(composite.architecture) or getattr(transformers, composite.architecture)
    settings = {"model_type": f"{REDUCED}{composite.model_type}", "__module__": __name__}
    named = f"{composite.architecture} with widths per block in its decoder."
    config: Any = type(f"Modepress{stock.config_class.__name__}", (stock.config_class,), {**settings, "__doc__": named})
    attributes = {"config_class": config, "__doc__": named, "__module__": __name__}
    model = type(reduced_architecture(composite), (_ReducedWhole, stock), attributes)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    names = get_checkpoint_conversion_mapping(composite.architecture)
    names = names or get_checkpoint_conversion_mapping(composite.model_type)
    if names:  # the stock class's own way from names on disk to those in memory
        register_checkpoint_conversion_mapping(model.__name__, names, overwrite=True)
