"""The before/after report: for machines, complete, immutable. Every number in it was measured in this job."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen
from api_schemas.export_reports import ExportReport as ExportReport
from api_schemas.heartbeats import Work
from api_schemas.plans import BlockShape, Plan
from api_schemas.recipe import Recipe
from api_schemas.targets import Target


class BeforeAfter(Frozen):
    """One quantity of the original model and of the compressed one."""

    before: float
    after: float


class CountBeforeAfter(Frozen):
    """One whole number of the original model and of the compressed one."""

    before: int
    after: int


class MeasuredPair(Frozen):
    """A quantity that may not have been measured; then `reason` says why."""

    before: float | None
    after: float | None
    reason: str | None = None


class TextUse(Frozen):
    """Which text was used, and how much of what was asked for."""

    source: str
    sha256: Annotated[
        str,
        Field(description="of the token ids used, little-endian int64; with images, of that digest and their files'"),
    ]
    requested: Annotated[int, Field(description="windows asked for")]
    used: Annotated[int, Field(description="windows used")]
    sequence_length: int
    tokens_used: Annotated[int, Field(description="of text and of images")]
    image_tokens: Annotated[int, Field(description="of these, those that stand for images")] = 0
    images: Annotated[int, Field(description="whole in a window")] = 0
    images_left_out: Annotated[
        int, Field(description="did not fit into what was left of a window, which their text filled")
    ] = 0


class Divergence(Frozen):
    """How far the compressed model's next-token distribution is from the original's (nats per token)."""

    mean_kl: float
    kl_99th_percentile: float
    top1_agreement: Annotated[float, Field(ge=0.0, le=1.0)]


class ModuleReport(Frozen):
    """What was done to one part of one block."""

    module: str
    width_before: int
    width_after: int
    relative_output_error: Annotated[
        float,
        Field(
            description="mlp and value_output: ‖X(W−Ŵ)ᵀ‖/‖XWᵀ‖ (mode refined: against the re-fit's target); "
            "query_key: root of the share of pair energy lost; a quantised linear: ‖X(W−Ŵ)ᵀ‖/‖XWᵀ‖"
        ),
    ]
    damping: Annotated[float, Field(description="largest multiple of the mean diagonal a factorisation needed")]
    ridge: Annotated[
        float | None, Field(description="mode refined: of the part's last re-fit, chosen on held-out tokens")
    ] = None
    bits: Annotated[int | None, Field(description="of one weight's code; null where weights stay floating")] = None
    fallback: str | None = None
    coverage: Annotated[
        tuple[int, ...] | None, Field(description="calibration tokens that each expert saw; null without experts")
    ] = None


class Rerun(Frozen):
    """A block that looked wrong and was solved again."""

    reason: str
    verdict: Annotated[
        Literal["correct", "transient"],
        Field(description="`correct`: the same to the bit; `transient`: another result, which a third run confirmed"),
    ]
    errors: Annotated[
        tuple[float | None, ...], Field(description="relative output error of each run; null where not finite")
    ]


class BlockReport(Frozen):
    """What one step of the recipe did to one decoder block, what it cost and what it lost."""

    step: Annotated[int, Field(description="number of the recipe's step, from 0")] = 0
    block: int
    block_influence: Annotated[
        float,
        Field(
            description="1 − E[cos] of the original block's inputs and outputs; in mode reference with propagation "
            "sequential, on the first calibration chunk"
        ),
    ]
    sparsity: Annotated[float, Field(description="fraction of this block's parameters removed")]
    parameters: CountBeforeAfter
    bytes: Annotated[CountBeforeAfter, Field(description="of its weights, scales included")]
    relative_output_error: Annotated[
        float, Field(description="‖ŷ − y‖/‖y − x‖ on the first calibration chunk: what is lost of what the block adds")
    ]
    stream_error: Annotated[
        float | None,
        Field(description="‖compressed − original‖/‖original‖ of the hidden states after it; null where one is walked"),
    ] = None
    seconds: float
    modules: tuple[ModuleReport, ...]
    rerun: Annotated[Rerun | None, Field(description="null where nothing looked wrong")] = None


class StepReport(Frozen):
    """What one step of the recipe did to the model that it was handed."""

    method: str
    parameters: CountBeforeAfter
    bytes: Annotated[CountBeforeAfter, Field(description="of the weights, counted from the tensors' sizes")]
    seconds: Annotated[float, Field(description="of its blocks, those of earlier attempts included")]


class ReloadProof(Frozen):
    """The artifact was loaded in a fresh process and compared with what was computed in memory."""

    max_logit_difference: float
    tolerance: float
    tokens: int
    loader: Annotated[str, Field(description="the class that loaded it, and whether project code was needed")]
    greedy_text: Annotated[str, Field(description="a smoke generation of the reloaded artifact")]


class Trial(Frozen):
    """One compression that a search has made and measured: a point of the frontier."""

    sparsity: float
    parameters: Annotated[int, Field(description="of the whole model")]
    predicted_perplexity: Annotated[float, Field(description="what was expected before it was measured")]
    perplexity: Annotated[float, Field(description="measured on the search's text")]
    increase: Annotated[float, Field(description="relative to the original on the same text")]
    within_target: bool
    seconds: float


class SearchReport(Frozen):
    """How a target for quality was met: what was tried, what was measured, and on which text."""

    target: Target
    text: Annotated[
        TextUse, Field(description="windows of the calibration text, neither calibrated on nor of the evaluation")
    ]
    perplexity_before: float
    predicted_from: Annotated[str, Field(description="what the first prediction rests on")]
    frontier: Annotated[tuple[Trial, ...], Field(description="every trial, from the largest model to the smallest")]
    chosen: Annotated[int, Field(description="index into frontier: the artifact is this very trial")]
    ended: Annotated[str, Field(description="why no further trial was made")]


class TimeShare(Frozen):
    """Seconds, and their share of the job's wall time."""

    seconds: float
    share: float


class CodeOption(Frozen):
    """One number of bits that a linear could have got."""

    bits: Annotated[int, Field(description="of one weight; 16: as it is")]
    bytes: int
    error: Annotated[
        float, Field(description="‖y − ŷ‖/‖y‖ of its outputs, with inputs rounded as the kernels round them")
    ]


class CodeChoice(Frozen):
    """What one linear got, and what it could have got."""

    module: str
    bits: int
    options: tuple[CodeOption, ...]


class CodesReport(Frozen):
    """Method tinygptv: where the budget went."""

    limit: Annotated[int | None, Field(description="bytes that all may take; null under preset paper")]
    weights: Annotated[int, Field(description="bytes of all weights as chosen")]
    cache: Annotated[int, Field(description="bytes of keys and values")]
    activations: int
    mixes: Annotated[bool, Field(description="whether 4 and 8 bits could stand beside each other")]
    tower_bits: Annotated[int | None, Field(description="of the vision tower's linears; null without one")]
    tower_error: Annotated[
        float | None, Field(description="‖W − Ŵ‖/‖W‖ of the tower's linears at 8 bits: of weights, not of outputs")
    ]
    choices: tuple[CodeChoice, ...]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.activations


class JobTime(Frozen):
    """Where a job's time went, over all its attempts; read from its time line."""

    wall_seconds: Annotated[float, Field(description="from the start of the first attempt to the end of the last")]
    attempts: Annotated[int, Field(description="that left a time line")]
    spent: Annotated[
        dict[Work, TimeShare],
        Field(description="own time of all attempts: of a slice, without what lies inside it"),
    ]
    lost: Annotated[TimeShare, Field(description="between attempts, at starts and ends, and amid what a kill cut off")]
    effective_rate: Annotated[
        float,
        Field(description="of the wall time, the share that the result holds: the last attempt, and blocks of earlier"),
    ]


class CompressionReport(Frozen):
    """The whole before/after table of a job."""

    model: str
    recipe: Recipe
    recipe_hash: str
    plan: Annotated[Plan, Field(description="as it was drawn before the first block")]
    shapes: Annotated[tuple[BlockShape, ...], Field(description="the widths that the blocks have now")]
    perplexity: BeforeAfter
    divergence: Divergence
    parameters: CountBeforeAfter
    block_parameters: CountBeforeAfter
    bytes: CountBeforeAfter
    tokens_per_second: MeasuredPair
    peak_memory_bytes: MeasuredPair
    seconds: float
    stage_seconds: dict[str, float]
    ranks: Annotated[int, Field(description="processes that shared the calibration")] = 1
    device: Annotated[str, Field(description="where the walks ran: cpu, or a GPU's number and model")] = "cpu"
    peak_rss_bytes: Annotated[int, Field(description="of the job process")]
    calibration: TextUse
    evaluation: TextUse
    steps: tuple[StepReport, ...]
    blocks: Annotated[tuple[BlockReport, ...], Field(description="all blocks of the first step, then of the second")]
    reload: ReloadProof
    exports: tuple[ExportReport, ...] = ()
    codes: Annotated[CodesReport | None, Field(description="of method tinygptv: bits by measured error")] = None
    removed_blocks: Annotated[
        tuple[int, ...], Field(description="blocks of the original that went whole; `blocks` counts those that stayed")
    ] = ()
    search: Annotated[SearchReport | None, Field(description="null where no trials were needed")] = None
    warnings: tuple[str, ...]
    files: dict[str, str]
    versions: dict[str, str]
    gate_passed: bool | None
    time: Annotated[JobTime | None, Field(description="null outside the service")] = None
