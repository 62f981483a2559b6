"""The union of all method settings: one line a method, discriminated by `method`."""

from typing import Annotated

from pydantic import Field

from api_schemas.methods.gptq import GptqConfig
from api_schemas.methods.int8 import Int8Config
from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.methods.nf4 import Nf4Config
from api_schemas.methods.round_to_nearest import RoundToNearestConfig
from api_schemas.methods.tinygptv import TinygptvConfig

GridConfig = GptqConfig | RoundToNearestConfig
FormConfig = GptqConfig | RoundToNearestConfig | Int8Config | Nf4Config  # one form for all linears
QuantizationConfig = FormConfig | TinygptvConfig
MethodConfig = Annotated[
    ModegptConfig  # narrows blocks
    | GptqConfig  # codes, with errors made up for
    | RoundToNearestConfig  # codes, the baseline
    | Int8Config  # codes of bitsandbytes, inputs rounded too
    | Nf4Config  # codes of bitsandbytes, from a table of values
    | TinygptvConfig,  # codes of bitsandbytes, bits chosen for each linear
    Field(discriminator="method"),
]

__all__ = [
    "FormConfig",
    "GptqConfig",
    "GridConfig",
    "Int8Config",
    "MethodConfig",
    "ModegptConfig",
    "Nf4Config",
    "QuantizationConfig",
    "RoundToNearestConfig",
    "TinygptvConfig",
]
