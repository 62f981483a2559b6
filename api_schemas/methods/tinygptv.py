"""Settings of the mixed-precision scheme of TinyGPT-V (Yuan et al., arXiv 2312.16862), made an artifact."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from api_schemas.methods.int8 import Int8Config
from api_schemas.methods.nf4 import Nf4Config
from api_schemas.methods.quantization_step import QuantizationStep
from api_schemas.targets import Bytes

Device = Literal["4GB", "6GB", "8GB", "12GB", "16GB", "24GB"]
USABLE = 0.9  # of a device's memory: what driver, runtime and fragmentation leave


class TinygptvConfig(QuantizationStep):
    """Each linear gets 4, 8 or 16 bits by the error that was measured for it, within a budget of a device's memory."""

    method: Literal["tinygptv"]
    preset: Annotated[
        Literal["budget", "paper"],
        Field(description="budget: bits by measured error within fit_bytes; paper: the decoder's linears in LLM.int8"),
    ] = "budget"
    fit_bytes: Annotated[
        Bytes | None,
        Field(
            description="memory at most, for weights, the cache of keys and values, and activations of one sequence: "
            "a number, or text such as '8 GB'"
        ),
    ] = None
    device: Annotated[
        Device | None, Field(description=f"instead of fit_bytes: a device's memory, of which {USABLE:.0%} are used")
    ] = None
    context_length: Annotated[
        int, Field(ge=1, le=1_000_000, description="tokens whose keys and values, and activations, are counted")
    ] = 2048
    outlier_threshold: Annotated[
        float, Field(ge=0.0, le=1e4, description="of the linears in LLM.int8, as for int8")
    ] = 6.0

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("fit_bytes", "device") if getattr(self, name) is not None]
        if self.preset == "paper" and given:
            raise ValueError(f"{given[0]} belongs to preset 'budget'; preset 'paper' chooses nothing, so leave it out")
        if self.preset == "budget" and len(given) != 1:
            raise ValueError("preset 'budget' needs exactly one of fit_bytes ('8 GB') and device ('8GB')")
        return self

    @property
    def limit(self) -> int | None:
        """Bytes that all may take together; None under preset `paper`."""
        if self.device is not None:
            return int(int(self.device.removesuffix("GB")) * 2**30 * USABLE)
        return self.fit_bytes

    @property
    def int8(self) -> Int8Config:
        """What is done to a linear of 8 bits."""
        return Int8Config(method="int8", outlier_threshold=self.outlier_threshold)

    @property
    def nf4(self) -> Nf4Config:
        """What is done to a linear of 4 bits."""
        return Nf4Config(method="nf4")
