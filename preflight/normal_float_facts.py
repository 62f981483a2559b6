"""What bitsandbytes keeps as text beside 4-bit codes; its length is part of what a model's file will hold."""

import json

OFFSET = "nested_offset"
NESTED_BLOCK = 256
LONGEST_NUMBER = 24  # a float as JSON: room is kept for it, so that a size is known before the number is


def facts_text(shape: tuple[int, int], block_size: int, dtype: str, offset: float | None) -> str:
    """The JSON text of one weight, in the library's own order of keys.

    Args:
        shape: `(out, in)` of the weight.
        block_size: inputs that share a scale.
        dtype: of the weights, such as `bfloat16`.
        offset: mean of the scales under double quantisation; None without.
    """
    facts = {"quant_type": "nf4", "blocksize": block_size, "dtype": dtype, "shape": list(shape)}
    if offset is None:
        return json.dumps(facts)
    facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", OFFSET: offset}
    without = len(json.dumps({**facts, OFFSET: 0})) - 1
    return json.dumps(facts).ljust(without + LONGEST_NUMBER)
