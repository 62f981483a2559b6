"""Settings of GPTQ (Frantar et al., arXiv 2210.17323)."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.methods.weight_grid import WeightGrid


class GptqConfig(WeightGrid):
    """Weights are rounded column by column, and each column's error is made up for by those not yet rounded."""

    method: Literal["gptq"]
    activation_order: Annotated[
        bool,
        Field(
            description="round columns of large inputs first, while many others can still make up for them; groups "
            "stay runs of adjacent columns, so nothing of it is stored"
        ),
    ] = True
    damping_fraction: Annotated[
        float,
        Field(gt=0.0, le=1.0, description="added to the Hessian's diagonal, in units of its mean"),
    ] = 0.01
