"""A recipe: what is done to a model, on which text it is calibrated, and how it is judged."""

from typing import Annotated

from pydantic import Field

from api_schemas.base import Frozen
from api_schemas.calibration import Calibration, Evaluation, Gate
from api_schemas.methods import MethodConfig


class Recipe(Frozen):
    """A list of method steps and everything around them; all but `steps` has a sensible default."""

    steps: Annotated[tuple[MethodConfig, ...], Field(min_length=1, max_length=1)]
    exports: Annotated[tuple[()], Field(description="foreign formats; none is written yet, so it must be empty")] = ()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    gate: Gate | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of everything random; the caller's RNG is untouched")] = 0
