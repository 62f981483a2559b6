"""Settings of LLM.int8() (Dettmers et al., arXiv 2208.07339)."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.methods.quantization_step import QuantizationStep


class Int8Config(QuantizationStep):
    """Weights become 8-bit codes with one scale for each row; inputs are rounded likewise while the model runs."""

    method: Literal["int8"]
    outlier_threshold: Annotated[
        float,
        Field(
            ge=0.0,
            le=1e4,
            description="absolute value of an input from which its column is multiplied as it is, not as codes; 0 "
            "rounds every column",
        ),
    ] = 6.0

    @property
    def bits(self) -> int:
        """Of one weight's code."""
        return 8
