"""A recipe: what is done to a model, on which text it is calibrated, and how it is judged."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from api_schemas.base import Frozen
from api_schemas.calibration import Calibration, Evaluation, Gate
from api_schemas.exports import ExportConfig
from api_schemas.methods import MethodConfig, ModegptConfig, QuantizationConfig

STAGES = ("structure", "quantize")  # the order of a recipe's steps: what is quantised keeps its shape


class Recipe(Frozen):
    """A list of method steps and everything around them; all but `steps` has a sensible default."""

    steps: Annotated[
        tuple[MethodConfig, ...],
        Field(
            min_length=1,
            max_length=2,
            description="modegpt, or a quantisation, or both in this order: the second is calibrated on what the "
            "first has made",
        ),
    ]
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

    @field_validator("steps")
    @classmethod
    def _structure_before_numbers(cls, steps: tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
        names, places = [step.method for step in steps], [STAGES.index(step.stage) for step in steps]
        if len(set(places)) < len(places):
            raise ValueError(f"{names} are two of one kind; keep one of them")
        if places != sorted(places):
            raise ValueError(
                f"{names}: widths are chosen before weights become codes; put {names[1]!r} before {names[0]!r}"
            )
        return steps

    @property
    def structure(self) -> ModegptConfig | None:
        """The step that changes widths, if there is one."""
        return next((step for step in self.steps if step.stage == "structure"), None)

    @property
    def quantization(self) -> QuantizationConfig | None:
        """The step that turns weights into codes, if there is one; it is the last."""
        return next((step for step in self.steps if step.stage == "quantize"), None)

    @property
    def trials(self) -> int:
        """Compressions that may be tried to reach a target for quality; 0 where nothing is searched for."""
        return 0 if self.structure is None else self.structure.trials

    @property
    def layout(self) -> Literal["portable", "nemotron", "full"]:
        """How the artifact is laid out; without a change of widths it is an ordinary checkpoint."""
        return "portable" if self.structure is None else self.structure.layout
