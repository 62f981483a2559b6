"""What all methods that store weights as whole numbers have in common."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api_schemas.base import Frozen


class WeightGrid(Frozen):
    """Block linears as codes on a symmetric grid: `w ≈ scale · q`, q in [−2^(bits−1), 2^(bits−1) − 1]."""

    stage: ClassVar[Literal["quantize"]] = "quantize"

    bits: Annotated[Literal[4, 8], Field(description="of one weight's code")] = 4
    group_size: Annotated[
        Literal[32, 64, 128] | None,
        Field(description="inputs of a row that share a scale; null is one scale for the whole row"),
    ] = 64
