"""What a job will need: floating-point operations, peak memory, disk. From shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint
from preflight.families import Dimensions, Family
from preflight.shapes import block_costs, dense_shape

# Resident bytes of an interpreter with torch, transformers, a tokenizer and a tokenised text of one megabyte; measured
# 2026-11-25 on x86-64, CPU build of torch 2.13: 565 MiB.
INTERPRETER_BYTES = 600 * 1024**2
SEARCH_SHARE = 4  # a target for quality is measured on one window beyond so many of calibration
SAMPLE_SHARE, SAMPLE_TOKENS = 4, 8192  # the backward pass runs on one in so many windows, and on no more tokens
FLOAT32, FLOAT64 = 4, 8
CHUNK_TOKENS = 2048  # tokens of one forward pass of the walk, where windows are shorter
GRAM_PANEL = 256  # columns at once of a Gram matrix, of which only the upper triangle is computed
HEAD_ROWS = 256  # tokens whose logits are held at once in evaluation


@dataclass(frozen=True)
class Workload:
    """The sizes that decide cost; idle parameters are those of a block's experts that a token does not see."""

    size: Dimensions
    block_parameters: int
    compressed_parameters: float
    idle_parameters: int
    compressed_idle_parameters: float
    calibration_tokens: int
    calibration_length: int
    evaluation_tokens: int
    evaluation_length: int
    narrows: bool
    refined: bool
    priced: bool
    streams: int
    passes: int
    sample_tokens: int
    trials: int
    search_tokens: int
    embedding_bytes: int
    block_bytes: int

    @classmethod
    def of(cls, family: Family, checkpoint: Checkpoint, recipe: Recipe, shapes: Sequence[BlockShape]) -> "Workload":
        """Collect the sizes of one recipe on one checkpoint."""
        config, calibration, evaluation = checkpoint.config, recipe.calibration, recipe.evaluation
        costs = block_costs(family, config)
        prefix = family.block_prefix(0)
        refined = recipe.structure is not None and recipe.structure.mode == "refined"
        size, per_unit = family.dimensions(config), costs.per_mlp_unit
        idle = per_unit * (size.experts - size.routed) // size.experts
        outside = [entry for name, entry in checkpoint.tensors.items() if not name.startswith(family.blocks + ".")]
        return cls(
            size=size,
            block_parameters=costs.parameters(dense_shape(family, config)),
            compressed_parameters=sum(costs.parameters(shape) for shape in shapes) / max(1, len(shapes)),
            idle_parameters=idle * size.mlp_width,
            compressed_idle_parameters=idle * sum(shape.mlp_width for shape in shapes) / max(1, len(shapes)),
            calibration_tokens=calibration.num_samples * calibration.sequence_length,
            calibration_length=calibration.sequence_length,
            evaluation_tokens=evaluation.num_windows * evaluation.sequence_length,
            evaluation_length=evaluation.sequence_length,
            narrows=recipe.structure is not None,
            refined=refined,
            priced=recipe.structure is not None and recipe.structure.resolved_allocation == "marginal_error",
            streams=3 + len(family.post_norms) if refined else 1,
            passes=3 if family.is_parallel(config) else 2,
            sample_tokens=_sample_tokens(recipe),
            trials=recipe.trials,
            search_tokens=search_windows(recipe) * calibration.sequence_length,
            embedding_bytes=sum(entry.bytes for entry in outside),
            block_bytes=sum(entry.bytes for name, entry in checkpoint.tensors.items() if name.startswith(prefix)),
        )


def flops(work: Workload) -> float:
    """Multiply-adds times two: forward passes, Gram matrices and solves of calibration; both evaluations."""
    size = work.size
    attention = 2 * size.heads * size.head_dim  # of the causal half of scores and mixing, per token pair
    used = work.block_parameters - work.idle_parameters
    compressed_used = work.compressed_parameters - work.compressed_idle_parameters
    dense = 2 * used + attention * work.calibration_length
    compressed = 2 * compressed_used + attention * work.calibration_length
    gram = size.mlp_width * (size.mlp_width + GRAM_PANEL) * size.routed
    solve = (size.mlp_width**3 + 2 * size.mlp_width**2 * size.hidden) * size.experts
    head = 2 * size.hidden * size.vocabulary
    if not work.narrows:
        calibrate = 0.0
    elif work.refined:  # both streams, the compressed one by halves, which a parallel block cannot part; moments
        walk = dense + work.passes * compressed + 1.5 * gram
        calibrate = work.calibration_tokens * walk + work.sample_tokens * (4 * dense + gram) + 20 * solve
    else:
        calibrate = work.calibration_tokens * (dense + compressed + gram) + solve
    evaluate = work.evaluation_tokens * (2 * used + 2 * compressed_used)
    evaluate += work.evaluation_tokens * 2 * attention * work.evaluation_length
    judged = work.search_tokens * (work.trials + 1)  # the original once, then every trial
    calibrate = calibrate * max(1, work.trials) + judged * dense
    return float(size.blocks * (calibrate + evaluate) + (work.evaluation_tokens * 2 + judged) * head)


def peak_memory_bytes(work: Workload) -> int:
    """Resident bytes of the job process, at most: the largest of its stages.

    A block at a time, hidden states of the calibration set, second moments of the widest linear; the backward pass
    holds the inputs of all blocks for its sample; evaluation holds two heads in float32.
    """
    size = work.size
    state = size.hidden * FLOAT32
    blocks = 2 * work.block_parameters * FLOAT32 + 2 * work.block_bytes
    window = work.calibration_length * (6 * size.mlp_width + 8 * size.heads * size.head_dim + 8 * size.hidden) * FLOAT32
    square = size.mlp_width**2 * FLOAT64
    cross = size.mlp_width * size.hidden * FLOAT64
    embedding = work.embedding_bytes + work.calibration_tokens * state
    walk: float = work.streams * work.calibration_tokens * state
    if work.narrows and not work.refined:  # one block and its stored form; a chunk's moments, once as added in float64
        chunk = min(work.calibration_tokens, max(work.calibration_length, CHUNK_TOKENS))
        walk += work.block_parameters * FLOAT32 + work.block_bytes + (size.experts + 1.5) * square
        walk += chunk * (size.mlp_width + 4 * size.hidden) * FLOAT32
    else:
        walk += blocks + window + (6 * square + 3 * cross if work.refined else 0)
    backward = work.sample_tokens * state * (size.blocks + 2) + blocks + 2 * window + (5 if work.priced else 1) * square
    if work.refined and size.experts > 1:  # moments of every expert at once, in two folds; narrow experts, wide streams
        walk += 2 * size.experts * (square + cross) + 10 * size.hidden**2 * FLOAT64
        backward += size.experts * square + 6 * size.hidden**2 * FLOAT64
    heads = work.embedding_bytes + 2 * size.vocabulary * state + 8 * HEAD_ROWS * size.vocabulary * FLOAT32
    judged = 2 * max(work.evaluation_tokens, work.search_tokens)
    evaluate = judged * state + max(blocks + window, heads)
    return int(INTERPRETER_BYTES + max(embedding, walk, backward if work.sample_tokens else 0, evaluate))


def sample_windows(recipe: Recipe) -> int:
    """Calibration windows that the backward pass of mode `refined` runs on; 0 where the recipe needs none."""
    step, calibration = recipe.structure, recipe.calibration
    if step is None:
        return 0
    if not step.minds_the_loss and step.resolved_allocation != "marginal_error":
        return 0
    wanted = min(calibration.num_samples // SAMPLE_SHARE, SAMPLE_TOKENS // calibration.sequence_length)
    return max(1, wanted)


def search_windows(recipe: Recipe) -> int:
    """Windows beyond the calibration's on which trials are measured; 0 where nothing is searched for."""
    return max(1, recipe.calibration.num_samples // SEARCH_SHARE) if recipe.trials else 0


def _sample_tokens(recipe: Recipe) -> int:
    return sample_windows(recipe) * recipe.calibration.sequence_length


def disk_bytes(work: Workload, artifact_bytes: int) -> int:
    """Bytes written beside the source: the per-block results (of two trials, where there are some) and the artifact."""
    blocks = (2 if work.trials else 1) * int(
        work.size.blocks * work.block_bytes * work.compressed_parameters / max(1, work.block_parameters)
    )
    return artifact_bytes + blocks
