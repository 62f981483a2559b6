"""What a model needs in memory beside its weights while it answers: keys and values, activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api_schemas.plans import BlockShape
from preflight.families import Dimensions

HALF = 2  # bytes of a key, a value, an activation: they are 16-bit on every device that this is for
FLOAT32 = 4
STREAM_COPIES, MLP_COPIES = (
    6,
    3,
)  # of hidden and MLP width per token at once: stream, norm, query to output; gate, up, product


@dataclass(frozen=True)
class Needs:
    """Bytes beside the weights.

    Attributes:
        cache: keys and values.
        activations: of one pass over all tokens, the logits of one, and one image where there is a tower.
    """

    cache: int
    activations: int


def needs(
    size: Dimensions, shapes: Sequence[BlockShape], context_length: int, vision: Mapping[str, Any] | None
) -> Needs:
    """Count what one sequence takes beside the weights.

    Args:
        size: of the decoder.
        shapes: widths of its blocks.
        context_length: tokens.
        vision: the tower's configuration, or None.
    """
    per_token = sum(size.kv_heads * (shape.query_key_rank + shape.value_output_rank) for shape in shapes)
    widest = max(shape.mlp_width for shape in shapes)
    text = context_length * (STREAM_COPIES * size.hidden + MLP_COPIES * widest) * HALF
    text += context_length * size.hidden  # LLM.int8's codes of a linear's inputs
    return Needs(
        cache=context_length * per_token * HALF, activations=max(text, _image(vision)) + size.vocabulary * FLOAT32
    )


def _image(vision: Mapping[str, Any] | None) -> int:
    """Activations of one image in the tower; 0 where its configuration does not say."""
    side, patch = ((vision or {}).get(key) for key in ("image_size", "patch_size"))
    hidden, width = ((vision or {}).get(key) for key in ("hidden_size", "intermediate_size"))
    if not all(isinstance(one, int) and one > 0 for one in (side, patch, hidden, width)):
        return 0
    patches = (int(side or 0) // int(patch or 1)) ** 2 + 1
    return patches * (STREAM_COPIES * int(hidden or 0) + MLP_COPIES * int(width or 0)) * HALF
