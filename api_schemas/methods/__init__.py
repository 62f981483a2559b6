"""The union of all method settings: one line a method, discriminated by `method`."""

from typing import Annotated

from pydantic import Field

from api_schemas.methods.gptq import GptqConfig
from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.methods.round_to_nearest import RoundToNearestConfig

QuantizationConfig = GptqConfig | RoundToNearestConfig
MethodConfig = Annotated[
    ModegptConfig  # narrows blocks
    | GptqConfig  # codes, with errors made up for
    | RoundToNearestConfig,  # codes, the baseline
    Field(discriminator="method"),
]

__all__ = ["GptqConfig", "MethodConfig", "ModegptConfig", "QuantizationConfig", "RoundToNearestConfig"]
