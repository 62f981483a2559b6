"""Codes of 8 and 4 bits side by side: transformers has a configuration for the one or for the other.

A `quantization_config` with `quant_method: modepress_mixed` names the modules in LLM.int8; all other linears that are
not skipped are NF4. The linears are bitsandbytes' own, so they run wherever those run. bitsandbytes is imported when
such a model is loaded and not before: importing it looks for GPUs.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig

METHOD = "modepress_mixed"


class MixedCodesConfig(BitsAndBytesConfig):
    """Settings of both, and which modules have 8 bits."""

    def __init__(self, int8_modules: list[str] | None = None, **settings: Any) -> None:
        """Take what config.json says; 4 bits are the rule, the listed modules the exception."""
        settings.pop("quant_method", None)
        super().__init__(**{**settings, "load_in_4bit": True, "load_in_8bit": False})
        self.quant_method = METHOD
        self.int8_modules = int8_modules or []


class _Deserialize(ConversionOps):
    """Each linear by what is stored for it."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], **where: Any) -> dict[str, Any]:
        """Parameters of one linear from its stored tensors."""
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

        reader = Bnb8bitDeserialize if "SCB" in input_dict else Bnb4bitDeserialize
        parameters: dict[str, Any] = reader(self.hf_quantizer).convert(input_dict, **where)
        return parameters


class MixedCodesQuantizer(Bnb4BitHfQuantizer):
    """Builds linears of both kinds, loads both, unpacks both."""

    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": [*Bnb8BitHfQuantizer.serialized_names["weight"], *Bnb4BitHfQuantizer.serialized_names["weight"][1:]]
    }

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs: Any) -> None:
        settings: Any = self.quantization_config
        skipped = list(settings.llm_int8_skip_modules or [])
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        eights = {
            name
            for name in linears
            if should_convert_module(name, skipped) and not should_convert_module(name, settings.int8_modules)
        }
        for name in sorted(eights):
            model.set_submodule(name, _eight_bit(model.get_submodule(name), settings.llm_int8_threshold))
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def get_load_operations(self) -> dict[str, Any]:
        """How stored tensors become parameters."""
        return {"deserialize": _Deserialize}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from transformers.integrations import dequantize_and_replace

        for one in (BitsAndBytesConfig(load_in_8bit=True), self.quantization_config):
            model = dequantize_and_replace(model, quantization_config=one, dtype=dtype)
        return model


def _eight_bit(linear: Any, threshold: float) -> nn.Module:
    """A linear of LLM.int8 in the place of a plain one, still without weights."""
    from bitsandbytes.nn import Linear8bitLt

    with torch.device("meta"):
        made: Any = Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
        )
    made.weight.data = made.weight.data.to(torch.int8)
    made.source_cls = type(linear)
    module: nn.Module = made.requires_grad_(False)
    return module


def register() -> None:
    """Make transformers know this form; safe to call twice."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(MixedCodesConfig)
        register_quantizer(METHOD)(MixedCodesQuantizer)
