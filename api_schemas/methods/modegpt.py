"""Settings of the MoDeGPT method (Lin et al., arXiv 2408.09632)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from api_schemas.base import Frozen

ModuleType = Literal["mlp", "query_key", "value_output"]
ALL_MODULES: tuple[ModuleType, ...] = ("mlp", "query_key", "value_output")


class ModegptConfig(Frozen):
    """Structured decomposition: Nyström (MLP), column-row (query-key), SVD (value-output).

    `sparsity` counts parameters of the decoder blocks; embeddings, norms and head are never touched.
    """

    method: Literal["modegpt"]
    mode: Annotated[Literal["reference"], Field(description="the paper's three decompositions, as published")] = (
        "reference"
    )
    sparsity: Annotated[
        float, Field(gt=0.0, lt=0.95, description="fraction of the decoder blocks' parameters to remove")
    ]
    layout: Annotated[
        Literal["portable", "full"],
        Field(
            description="portable: one width for all blocks, loads in unmodified transformers; "
            "full: widths per block, rotary pairs per head, loads through compression.runtime"
        ),
    ] = "portable"
    allocation: Annotated[
        Literal["uniform", "block_influence"],
        Field(description="uniform: the same sparsity in every block; block_influence: softmax of block influence"),
    ] = "uniform"
    temperature: Annotated[
        float, Field(gt=0.0, description="of the block-influence softmax, in units of the mean block influence")
    ] = 1.0
    sparsity_cap: Annotated[float, Field(gt=0.0, lt=1.0, description="no block loses more than this fraction")] = 0.8
    propagation: Annotated[
        Literal["dense", "sequential"],
        Field(description="whose activations feed a block's statistics: the original model's or the compressed one's"),
    ] = "sequential"
    modules: Annotated[
        tuple[ModuleType, ...] | None,
        Field(
            min_length=1,
            description="which parts carry the sparsity; null takes all three in layout full and the MLP alone in "
            "layout portable, where one rotary subset for all heads costs far more than narrower MLPs",
        ),
    ] = None
    ridge: Annotated[
        float, Field(gt=0.0, description="ridge of the leverage scores, in units of the mean diagonal of the Gram")
    ] = 1e-2
    round_to: Annotated[
        int | None,
        Field(ge=1, le=1024, description="MLP widths are multiples of this; null takes 32 (portable) or 8 (full)"),
    ] = None

    @model_validator(mode="after")
    def _layout_allows_allocation(self) -> Self:
        if self.layout == "portable" and self.allocation != "uniform":
            raise ValueError(
                f"layout 'portable' needs one width for all blocks, so allocation must be 'uniform', "
                f"not {self.allocation!r}; use layout 'full' for per-block widths"
            )
        if self.modules is not None and len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules {list(self.modules)} names a part twice; name each once")
        if self.sparsity > self.sparsity_cap:
            raise ValueError(
                f"sparsity {self.sparsity} exceeds sparsity_cap {self.sparsity_cap}; lower one or raise the other"
            )
        return self

    @property
    def resolved_modules(self) -> tuple[ModuleType, ...]:
        """The parts that carry the sparsity, in the order of `ALL_MODULES`."""
        chosen = self.modules or (ALL_MODULES if self.layout == "full" else ("mlp",))
        return tuple(module for module in ALL_MODULES if module in chosen)

    @property
    def resolved_round_to(self) -> int:
        """The multiple to which MLP widths are rounded."""
        return self.round_to or (32 if self.layout == "portable" else 8)
