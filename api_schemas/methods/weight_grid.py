"""What all methods that store weights as whole numbers on a grid of our own have in common."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.methods.quantization_step import QuantizationStep


class WeightGrid(QuantizationStep):
    """Block linears as codes on a symmetric grid: `w ≈ scale · q`, q in [−2^(bits−1), 2^(bits−1) − 1]."""

    bits: Annotated[Literal[4, 8], Field(description="of one weight's code")] = 4
    group_size: Annotated[
        Literal[32, 64, 128] | None,
        Field(description="inputs of a row that share a scale; null is one scale for the whole row"),
    ] = 64
