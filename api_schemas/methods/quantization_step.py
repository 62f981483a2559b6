"""What all methods that turn weights into codes have in common."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from api_schemas.base import Frozen

ModulePath = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w-]+(\.[\w-]+)*$")]


class QuantizationStep(Frozen):
    """The linears of the decoder's blocks become codes; embeddings, norms, routers, the head and other parts never."""

    stage: ClassVar[Literal["quantize"]] = "quantize"

    skip_modules: Annotated[
        tuple[ModulePath, ...],
        Field(
            max_length=1024,
            description="linears of the blocks that stay as they are: a module's full path, or any run of whole words "
            "between its dots, such as 'model.layers.0', 'self_attn' or 'down_proj'",
        ),
    ] = ()
