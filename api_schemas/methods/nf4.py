"""Settings of the 4-bit normal float of QLoRA (Dettmers et al., arXiv 2305.14314)."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.methods.quantization_step import QuantizationStep


class Nf4Config(QuantizationStep):
    """Weights become 4-bit codes of a fixed table of 16 values, with one scale for each run of adjacent inputs."""

    method: Literal["nf4"]
    block_size: Annotated[
        Literal[64, 128, 256, 512, 1024, 2048, 4096],
        Field(description="adjacent inputs of a row that share a scale"),
    ] = 64
    double_quantization: Annotated[
        bool, Field(description="scales become 8-bit codes too: 4.13 bits a weight instead of 4.5 with block_size 64")
    ] = False
    error_correction: Annotated[
        bool,
        Field(
            description="columns are rounded one after the other, and those not yet rounded make up for its error "
            "on the calibration text, as in gptq; false rounds each weight alone, as bitsandbytes does"
        ),
    ] = False
    damping_fraction: Annotated[
        float,
        Field(gt=0.0, le=1.0, description="error_correction: added to the Hessian's diagonal, in units of its mean"),
    ] = 0.01
    compute_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        Field(description="in which a served model multiplies; weights and inputs are turned into it"),
    ] = "bfloat16"

    @property
    def bits(self) -> int:
        """Of one weight's code."""
        return 4
