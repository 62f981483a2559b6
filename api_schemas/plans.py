"""A plan: what a recipe would do to a model, from its configuration and safetensors headers alone."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen
from api_schemas.recipe import Recipe


class BlockShape(Frozen):
    """The inner widths of one decoder block."""

    mlp_width: int
    query_key_rank: Annotated[int, Field(description="channels per head in query and key; even under rotary")]
    value_output_rank: Annotated[int, Field(description="channels per head in value and output")]


class ModelPart(Frozen):
    """One part of a model that has several; only the language part is ever changed."""

    name: Literal["language", "vision", "table_encoder", "projector", "other"]
    parameters: int
    bytes: int


class Blocker(Frozen):
    """A named reason why the recipe cannot run on this model."""

    code: str
    message: str
    param: str | None = None


class RuntimeSupport(Frozen):
    """Whether a runtime loads the result, how, and how that is known.

    `verified` by a test or benchmark of ours that ran it on such a model; `believed` from its sources; `refused`: it
    stops with an error; `silently_wrong`: it loads without a word and computes another model.
    """

    runtime: str
    status: Literal["verified", "believed", "refused", "silently_wrong"]
    reason: str
    command: Annotated[str | None, Field(description="how to load it; FOLDER is the artifact's")] = None
    evidence: Annotated[str | None, Field(description="the test or benchmark behind a status, or what was read")] = None


class StepPlan(Frozen):
    """What one step of the recipe would change."""

    method: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops: Annotated[float, Field(description="of its walk; those of modegpt hold the evaluations too")]
    peak_memory_bytes: int


class QuantizedModule(Frozen):
    """What a quantisation would do to one linear of one block."""

    module: Annotated[str, Field(description="full path, as the checkpoint names it")]
    bits: Annotated[int | None, Field(description="of one weight's code; null where it stays as it is")]
    bytes_before: int
    bytes_after: Annotated[int, Field(description="codes, scales and what else is stored with them")]
    kept_by: Annotated[str | None, Field(description="the entry of skip_modules that keeps it")] = None


class Plan(Frozen):
    """What would happen: shapes, bytes, memory, time, and what stands in the way.

    Widths under allocation `block_influence` depend on data: then `shapes_final` is False and `blocks` holds the
    uniform widths with the same total.
    """

    object: Literal["compression.plan"] = "compression.plan"
    model: str
    family: str
    layout: str
    steps: tuple[StepPlan, ...]
    modules: tuple[str, ...]
    sparsity_requested: Annotated[
        float | None,
        Field(
            description="as given, or counted out from the target; null where trials find it, and then all sizes, "
            "time and memory are upper bounds"
        ),
    ]
    sparsity_planned: Annotated[float, Field(description="of the decoder blocks, after rounding")]
    parameters_before: int
    parameters_after: int
    block_parameters_before: int
    block_parameters_after: int
    bytes_before: int
    bytes_after: int
    parts: Annotated[
        tuple[ModelPart, ...], Field(description="before, of a model with several; all but the language part stay")
    ] = ()
    quantized: Annotated[
        tuple[QuantizedModule, ...],
        Field(
            description="of a recipe with a quantisation, all linears of the blocks; embeddings, norms, routers, the "
            "head and the parts around the decoder stay as they are"
        ),
    ] = ()
    blocks: tuple[BlockShape, ...]
    shapes_final: bool
    peak_memory_bytes: int
    disk_bytes: int
    flops: Annotated[float, Field(description="floating-point operations the job needs, counted from shapes")]
    estimated_seconds: float
    estimate_basis: Annotated[str, Field(description="the rate behind estimated_seconds: measured here, or assumed")]
    runtimes: tuple[RuntimeSupport, ...]
    notes: Annotated[tuple[str, ...], Field(description="choices that the recipe left open, and how they were made")]
    warnings: Annotated[tuple[str, ...], Field(description="oddities of the checkpoint that do not stand in the way")]
    blockers: tuple[Blocker, ...]


class PlanRequest(Frozen):
    """Body of `POST /v1/compression/plans`."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    recipe: Recipe
