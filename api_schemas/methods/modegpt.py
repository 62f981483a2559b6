"""Settings of the MoDeGPT method (Lin et al., arXiv 2408.09632)."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from api_schemas.base import Frozen
from api_schemas.targets import Target

ModuleType = Literal["mlp", "query_key", "value_output"]
REFINED_ONLY = ("metric", "column_choice", "refit", "input_refit")
SPARSITY_LIMIT = 0.95
ALL_MODULES: tuple[ModuleType, ...] = ("mlp", "query_key", "value_output")


class ModegptConfig(Frozen):
    """Structured decomposition: Nyström (MLP), column-row (query-key), SVD (value-output).

    `sparsity` counts parameters of the decoder blocks; embeddings, norms and head are never touched.
    """

    stage: ClassVar[Literal["structure"]] = "structure"

    method: Literal["modegpt"]
    mode: Annotated[
        Literal["reference", "refined"],
        Field(
            description="reference: the paper's three decompositions, as published; refined: the same with corrected "
            "re-fits on two streams, output-aware choices and budgets by marginal error"
        ),
    ] = "refined"
    sparsity: Annotated[
        float | None,
        Field(gt=0.0, lt=SPARSITY_LIMIT, description="fraction of the decoder blocks' parameters to remove"),
    ] = None
    target: Annotated[
        Target | None, Field(description="instead of a sparsity: what the compressed model may be at most")
    ] = None
    layout: Annotated[
        Literal["portable", "nemotron", "full"],
        Field(
            description="portable: one width for all blocks, loads in unmodified transformers; nemotron: MLP widths "
            "per block, attention whole, which vLLM and llama.cpp have native classes for; full: widths per block, "
            "rotary pairs per head, loads through compression.runtime"
        ),
    ] = "portable"
    allocation: Annotated[
        Literal["uniform", "block_influence", "marginal_error"] | None,
        Field(
            description="uniform: the same sparsity in every block; block_influence: softmax of block influence; "
            "marginal_error: where a parameter costs least, over blocks and parts (mode refined); null takes "
            "marginal_error in mode refined with layouts full and nemotron, else uniform"
        ),
    ] = None
    remove_blocks: Annotated[
        int,
        Field(
            ge=0,
            description="layout portable: so many whole blocks, of least block influence, are taken out first; they "
            "count towards sparsity, and the others lose what is left of it",
        ),
    ] = 0
    temperature: Annotated[
        float, Field(gt=0.0, description="of the block-influence softmax, in units of the mean block influence")
    ] = 1.0
    sparsity_cap: Annotated[
        float, Field(gt=0.0, lt=1.0, description="allocations per block: no block loses more than this fraction")
    ] = 0.8
    propagation: Annotated[
        Literal["dense", "sequential"],
        Field(
            description="whose activations feed a block's statistics: the original model's or the compressed one's; "
            "mode refined walks both"
        ),
    ] = "sequential"
    metric: Annotated[
        Literal["plain", "loss"] | None,
        Field(description="mode refined: errors by their length, or by how much the loss minds them; null takes loss"),
    ] = None
    column_choice: Annotated[
        Literal["leverage", "output_aware"] | None,
        Field(description="mode refined: which MLP units stay, by leverage or by what their removal costs the output"),
    ] = None
    refit: Annotated[
        Literal["local", "error_corrected"] | None,
        Field(description="mode refined: what o_proj and down_proj aim at, their old output or the original stream"),
    ] = None
    input_refit: Annotated[
        bool | None,
        Field(description="mode refined: re-fit the linears that read the stream to the compressed stream"),
    ] = None
    input_ridge: Annotated[
        float | None,
        Field(
            gt=0.0,
            description="mode refined: of input_refit, in units of the mean diagonal; null chooses for each linear "
            "what does best on held-out tokens",
        ),
    ] = None
    output_ridge: Annotated[
        float | None, Field(gt=0.0, description="mode refined: of the re-fits of o_proj and down_proj, likewise")
    ] = None
    modules: Annotated[
        tuple[ModuleType, ...] | None,
        Field(
            min_length=1,
            description="which parts carry the sparsity; null takes all three in layout full and the MLP alone in the "
            "others: one rotary subset for all heads, as portable needs, costs far more than narrower MLPs",
        ),
    ] = None
    singular_values: Annotated[
        Literal["output", "balanced", "value"],
        Field(
            description="value_output: where the singular values go, which changes no output: into o_proj, as "
            "published; by their roots into both; or into v_proj, which leaves o_proj's channels alike and costs least "
            "when it is quantised afterwards"
        ),
    ] = "output"
    ridge: Annotated[
        float, Field(gt=0.0, description="ridge of the leverage scores, in units of the mean diagonal of the Gram")
    ] = 1e-2
    round_to: Annotated[
        int | None,
        Field(ge=1, le=1024, description="MLP widths are multiples of this; null takes 8 in layout full, else 32"),
    ] = None

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if (self.sparsity is None) == (self.target is None):
            raise ValueError(
                "give exactly one of sparsity (a fraction) and target (parameters, bytes or perplexity_increase)"
            )
        if self.layout == "portable" and self.resolved_allocation != "uniform":
            raise ValueError(
                f"layout 'portable' needs one width for all blocks, so allocation must be 'uniform', "
                f"not {self.allocation!r}; use layout 'full' for per-block widths"
            )
        if self.layout == "nemotron" and self.modules not in (None, ("mlp",)):
            raise ValueError(
                f"layout 'nemotron' has widths per block for the MLP alone, so modules must be ['mlp'], not "
                f"{list(self.modules or ())}; use layout 'full' to reduce attention"
            )
        if self.remove_blocks and self.layout != "portable":
            raise ValueError(
                f"remove_blocks {self.remove_blocks} belongs to layout 'portable'; layout {self.layout!r} has budgets "
                "per block instead"
            )
        if self.remove_blocks and self.target is not None:
            raise ValueError("remove_blocks counts towards a sparsity; give a sparsity in the place of target")
        if self.mode == "reference":
            given = [name for name in REFINED_ONLY if getattr(self, name) is not None]
            if given or self.allocation == "marginal_error":
                named = given[0] if given else "allocation 'marginal_error'"
                raise ValueError(f"{named} belongs to mode 'refined'; leave it out or choose that mode")
        elif self.propagation == "dense":
            raise ValueError("mode 'refined' walks both streams; propagation 'dense' belongs to mode 'reference'")
        if self.modules is not None and len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules {list(self.modules)} names a part twice; name each once")
        if self.sparsity is not None and self.sparsity > self.sparsity_cap:
            raise ValueError(
                f"sparsity {self.sparsity} exceeds sparsity_cap {self.sparsity_cap}; lower one or raise the other"
            )
        return self

    @property
    def trials(self) -> int:
        """Compressions that may be tried to reach the target; 0 where nothing is searched for."""
        return 0 if self.target is None else self.target.most_trials

    @property
    def known_sparsity(self) -> float:
        """The sparsity, where it was given or a plan has settled it.

        Raises:
            ValueError: there is only a target; `preflight.targets.settle` makes a sparsity of it.
        """
        if self.sparsity is None:
            raise ValueError("this step has a target and no sparsity yet")
        return self.sparsity

    def at(self, sparsity: float) -> Self:
        """The same step with a sparsity in the place of its target."""
        return self.model_copy(update={"sparsity": sparsity, "target": None})

    @property
    def resolved_allocation(self) -> Literal["uniform", "block_influence", "marginal_error"]:
        """How the budget is split over blocks."""
        if self.allocation is not None:
            return self.allocation
        return "marginal_error" if self.mode == "refined" and self.layout != "portable" else "uniform"

    @property
    def minds_the_loss(self) -> bool:
        """Whether the sensitivity of the loss is measured and used."""
        return self.mode == "refined" and self.metric != "plain"

    @property
    def chooses_columns(self) -> Literal["leverage", "output_aware"]:
        """How MLP units are chosen."""
        return self.column_choice or ("output_aware" if self.mode == "refined" else "leverage")

    @property
    def refits(self) -> Literal["local", "error_corrected"]:
        """What the output linears are re-fitted to."""
        return self.refit or ("error_corrected" if self.mode == "refined" else "local")

    @property
    def corrects_inputs(self) -> bool:
        """Whether linears that read the stream are re-fitted to the compressed one."""
        return self.mode == "refined" and self.input_refit is not False

    @property
    def resolved_modules(self) -> tuple[ModuleType, ...]:
        """The parts that carry the sparsity, in the order of `ALL_MODULES`."""
        chosen = self.modules or (ALL_MODULES if self.layout == "full" else ("mlp",))
        return tuple(module for module in ALL_MODULES if module in chosen)

    @property
    def resolved_round_to(self) -> int:
        """The multiple to which MLP widths are rounded."""
        return self.round_to or (8 if self.layout == "full" else 32)
