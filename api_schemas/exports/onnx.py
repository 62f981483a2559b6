"""Settings of the ONNX export, the format of onnxruntime."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen

OnnxWeights = Literal["float32", "int8", "int4"]


class OnnxExport(Frozen):
    """A graph with a key-value cache for onnxruntime, which this service can also answer with.

    What codes cost is measured for each operator on the calibration text; with inputs `tensor` those that they would
    harm are found so, and treated.
    """

    format: Literal["onnx"]
    weights: Annotated[
        OnnxWeights,
        Field(description="float32; int8: 8-bit weights; int4: 4-bit weights in the blocks, 8-bit embedding and head"),
    ] = "int8"
    inputs: Annotated[
        Literal["block", "tensor"],
        Field(
            description="of int8: how an operator's inputs become 8-bit codes at run time. block: one scale per token "
            "and block; tensor: one scale for all of them, the classic dynamic quantisation, and `block` where that "
            "does harm"
        ),
    ] = "block"
    per_channel: Annotated[
        bool, Field(description="of int8 with inputs `tensor`: a scale for each output of a weight, not one for all")
    ] = True
    block: Annotated[Literal[16, 32, 64, 128], Field(description="adjacent inputs that share a scale, in blocks")] = 32
    max_error: Annotated[
        float,
        Field(
            gt=0.0,
            lt=1.0,
            description="of int8 with inputs `tensor`: an operator whose outputs would differ by more, "
            "‖y − ŷ‖/‖y‖ on the calibration text, is coded in blocks, and stays float32 where that is as bad",
        ),
    ] = 0.05
    max_increase: Annotated[
        float,
        Field(
            gt=0.0,
            description="of int8 with inputs `tensor`: while perplexity on calibration text rises by more than this "
            "fraction, max_error is halved and the graph is made again",
        ),
    ] = 0.03

    @property
    def target(self) -> str:
        """The folder inside the artifact."""
        return f"exports/onnx-{self.weights}"
