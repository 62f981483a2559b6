"""What a job will need: floating-point operations, peak memory, disk. From shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from preflight.checkpoint import Checkpoint
from preflight.families import Dimensions, Family
from preflight.shapes import block_costs, dense_shape

# Resident bytes of an interpreter that has imported torch and transformers; measured 2026-11-25 on x86-64, CPU build.
INTERPRETER_BYTES = 520 * 1024**2
FLOAT32, FLOAT64 = 4, 8
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
    streams: int
    embedding_bytes: int
    block_bytes: int

    @classmethod
    def of(cls, family: Family, checkpoint: Checkpoint, recipe: Recipe, shapes: Sequence[BlockShape]) -> "Workload":
        """Collect the sizes of one recipe on one checkpoint."""
        config, calibration, evaluation = checkpoint.config, recipe.calibration, recipe.evaluation
        costs = block_costs(family, config)
        prefix = family.block_prefix(0)
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
            streams=2 if recipe.steps[0].propagation == "dense" else 1,
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
    gram = 2 * size.mlp_width**2 * size.routed
    solve = (size.mlp_width**3 + 2 * size.mlp_width**2 * size.hidden) * size.experts
    head = 2 * size.hidden * size.vocabulary
    calibrate = work.calibration_tokens * (dense + compressed + gram) + solve
    evaluate = work.evaluation_tokens * (2 * used + 2 * compressed_used)
    evaluate += work.evaluation_tokens * 2 * attention * work.evaluation_length
    return float(size.blocks * (calibrate + evaluate) + work.evaluation_tokens * 2 * head)


def peak_memory_bytes(work: Workload) -> int:
    """Resident bytes of the job process: a block at a time, hidden states of the calibration set, Gram matrices."""
    size = work.size
    hidden_states = work.calibration_tokens * size.hidden * FLOAT32 * work.streams
    blocks = 2 * work.block_parameters * FLOAT32 + work.block_bytes
    gram = size.mlp_width**2 * (FLOAT32 + (3 + size.experts) * FLOAT64)
    window = work.calibration_length * (4 * size.mlp_width + 6 * size.heads * size.head_dim + 6 * size.hidden) * FLOAT32
    calibrate = hidden_states + blocks + gram + window
    evaluation_states = 2 * work.evaluation_tokens * size.hidden * FLOAT32
    head = work.embedding_bytes + size.vocabulary * (size.hidden + 6 * HEAD_ROWS) * FLOAT32
    evaluate = evaluation_states + max(blocks, head)
    return int(INTERPRETER_BYTES + max(calibrate, evaluate))


def disk_bytes(work: Workload, artifact_bytes: int) -> int:
    """Bytes written beside the source: the per-block results and the artifact."""
    blocks = int(work.size.blocks * work.block_bytes * work.compressed_parameters / max(1, work.block_parameters))
    return artifact_bytes + blocks
