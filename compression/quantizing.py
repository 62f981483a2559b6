"""The quantising step: which method each linear gets, the walk that applies it, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api_schemas.methods import GptqConfig, Int8Config, Nf4Config, QuantizationConfig, TinygptvConfig
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from api_schemas.reports import CodesReport
from compression.code_choices import choose_codes
from compression.core.block_store import FolderBlockStore
from compression.core.linear_walk import LinearMethod, LinearStream
from compression.core.protocols import Streamed
from compression.core.quantized_config import Bits, bits_of
from compression.core.tower import tower_others
from compression.methods.gptq import Gptq
from compression.methods.int8 import Int8
from compression.methods.nf4 import Nf4
from compression.methods.round_to_nearest import RoundToNearest
from compression.methods.tinygptv import Tinygptv
from compression.prepare import Prepared
from compression.stages import Stages
from preflight.code_budget import KEPT
from preflight.quantized_linears import BlockLinear, block_linears

Methods = Mapping[tuple[int, str], LinearMethod | None]


@dataclass(frozen=True)
class Quantization:
    """What the step will do, once everything that depends on data is settled.

    Attributes:
        methods: of each canonical linear by its block; None where it stays.
        bits: what each stored linear gets.
        codes: of method tinygptv, what was chosen from.
        tower_saved: bytes that the vision tower loses.
    """

    methods: Methods
    bits: Bits
    codes: CodesReport | None = None
    tower_saved: int = 0


def settle_quantization(
    recipe: Recipe,
    step: QuantizationConfig,
    ready: Prepared,
    model: Streamed,
    shapes: Sequence[BlockShape],
    store: FolderBlockStore,
    stages: Stages,
) -> Quantization:
    """Fix bits and methods; measures where the step asks for it.

    Args:
        recipe: the whole of it.
        step: its quantisation.
        ready: the original.
        model: what the step starts from.
        shapes: widths of its blocks.
        store: where measurements are kept.
        stages: hears of measuring.
    """
    placed = ready.checkpoint.placed
    if isinstance(step, TinygptvConfig):
        budget, chosen, codes = choose_codes(recipe, step, ready, model, shapes, store, stages)
        others: tuple[str, ...] = ()
        if chosen.tower != KEPT and placed is not None:
            others = tower_others(ready.model.folder, placed, budget.tower)
        saved = budget.tower_bytes(KEPT) - budget.tower_bytes(chosen.tower)
        return Quantization(Tinygptv(step).of(budget, chosen), Bits(chosen.bits, chosen.tower, others), codes, saved)
    config = ready.checkpoint.config
    linears = block_linears(ready.family, config, step.skip_modules, shapes, layout=recipe.layout, placed=placed)
    return Quantization(methods_of(step, linears), bits_of(step, linears))


def methods_of(step: QuantizationConfig, linears: Sequence[BlockLinear]) -> Methods:
    """The method of every linear under a step that treats all alike."""
    method = linear_method(step)
    return {(one.block, part): None if one.kept_by else method for one in linears for part in one.parts}


def quantizing_walk(model: Streamed, methods: Methods, ready: Prepared) -> LinearStream:
    """The walk, with its hidden states at the embeddings."""
    return LinearStream(model, methods, ready.calibration.embed(model, ready.share.windows), ready.share)


def linear_method(step: QuantizationConfig) -> LinearMethod:
    """The method that a step names.

    Raises:
        TypeError: the step has several.
    """
    if isinstance(step, Int8Config):
        return Int8(step)
    if isinstance(step, Nf4Config):
        return Nf4(step)
    if isinstance(step, TinygptvConfig):
        raise TypeError("tinygptv has a method for each linear")
    return Gptq(step) if isinstance(step, GptqConfig) else RoundToNearest(step)
