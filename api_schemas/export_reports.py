"""What a job says of the foreign formats that it wrote."""

from typing import Annotated

from pydantic import Field

from api_schemas.base import Frozen


class ExportedOperator(Frozen):
    """How one matrix of an exported graph is held, and what that costs where it is used."""

    name: str
    coding: Annotated[str, Field(description="number format of the matrix and of what is multiplied by it")]
    bytes: int
    relative_error: Annotated[
        float | None,
        Field(description="‖y − ŷ‖/‖y‖ of its outputs on calibration text; null where it was not measured"),
    ] = None
    reason: Annotated[str | None, Field(description="why it is held in another way than most")] = None


class ExportQuality(Frozen):
    """The export as it is served: run by its own runtime on the evaluation text."""

    runtime: str
    perplexity: float
    tokens: int


class ExportReport(Frozen):
    """A foreign format that was written beside the weights, and read back."""

    format: str
    target: Annotated[str, Field(description="file or folder inside the artifact")]
    bytes: int
    architecture: Annotated[str, Field(description="the name under which the foreign runtime knows the model")]
    tensors: Annotated[dict[str, int], Field(description="how many tensors have which number format")]
    relative_error: Annotated[
        float, Field(description="largest ‖W−Ŵ‖/‖W‖ of a tensor, Ŵ read back from the file; 0 without weights")
    ]
    notes: tuple[str, ...] = ()
    quality: Annotated[
        ExportQuality | None, Field(description="null for formats whose runtime is not part of this project")
    ] = None
    operators: Annotated[
        tuple[ExportedOperator, ...], Field(description="matrices whose form was chosen one by one; else empty")
    ] = ()
