"""Settings of the GGUF export, the format of llama.cpp."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen

GgufType = Literal["f32", "bf16", "q8_0"]


class GgufExport(Frozen):
    """One GGUF file with weights and tokenizer, written by this project.

    llama.cpp's own converter leaves out the rotary factors of reduced attention without a word.
    """

    format: Literal["gguf"]
    dtype: Annotated[
        GgufType,
        Field(
            description="of the matrices: f32; bf16; or q8_0, 8-bit codes with a scale per 32 weights of a row. Norms "
            "and biases are always f32"
        ),
    ] = "q8_0"

    @property
    def target(self) -> str:
        """The file inside the artifact."""
        return f"exports/model-{self.dtype}.gguf"
