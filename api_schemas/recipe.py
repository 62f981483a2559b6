"""A recipe: what is done to a model, on which text it is calibrated, and how it is judged."""

from typing import Annotated

from pydantic import Field, field_validator

from api_schemas.base import Frozen
from api_schemas.calibration import Calibration, Evaluation, Gate
from api_schemas.exports import ExportConfig
from api_schemas.methods import MethodConfig


class Recipe(Frozen):
    """A list of method steps and everything around them; all but `steps` has a sensible default."""

    steps: Annotated[tuple[MethodConfig, ...], Field(min_length=1, max_length=1)]
    exports: Annotated[
        tuple[ExportConfig, ...],
        Field(max_length=8, description="foreign formats written beside the weights, under exports/ in the artifact"),
    ] = ()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    gate: Gate | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of everything random; the caller's RNG is untouched")] = 0

    @field_validator("exports")
    @classmethod
    def _each_export_once(cls, exports: tuple[ExportConfig, ...]) -> tuple[ExportConfig, ...]:
        targets = [export.target for export in exports]
        twice = next((target for target in targets if targets.count(target) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} would be written twice; name each export once")
        return exports
