"""Narrowing a stock decoder block: attention and MLP in canonical form, of other widths, everything else as it is."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.runtime.attention import ReducedAttention
from preflight.families import Family, table

PREFIX = "modepress_"


class SplitMlp(nn.Module):
    """A gated MLP whose gate and up projections are linears of their own; replaces one that fuses them."""

    def __init__(self, stock: Any) -> None:
        """Take the activation of `stock`; the linears are set by `resize_block_`."""
        super().__init__()
        self.activation = stock.activation_fn
        self.gate_proj = self.up_proj = self.down_proj = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[batch, tokens, hidden]` to the same shape."""
        units = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        result: Tensor = self.down_proj(units)
        return result


def reduced_model_type(family: str) -> str:
    """The `model_type` of a family's layout `full`."""
    return PREFIX + family


def family_of(config: Any) -> Family:
    """The table of a loaded configuration, of a stock model or of one in layout `full`."""
    return table(config.model_type.removeprefix(PREFIX))


def resize_block_(block: Any, shape: Mapping[str, int], scaling: float | None = None) -> None:
    """Replace a stock decoder block's attention and MLP by canonical ones of `shape`, uninitialised, in place.

    Args:
        block: a stock decoder layer of a family that has a table.
        shape: `mlp_width`, `query_key_rank`, `value_output_rank`.
        scaling: of the attention logits; None keeps the original's.
    """
    config = next(module.config for module in block.modules() if hasattr(module, "config"))
    family = family_of(config)
    stock = block.get_submodule(family.attention.module)
    attention = ReducedAttention(stock, family, shape["query_key_rank"], shape["value_output_rank"])
    attention.scaling = stock.scaling if scaling is None else scaling
    block.set_submodule(family.attention.module, attention)
    _resize_mlp_(block, family, config.to_dict(), shape["mlp_width"])


def _resize_mlp_(block: Any, family: Family, settings: Mapping[str, Any], width: int) -> None:
    names, hidden = family.mlp, family.dimensions(settings).hidden
    if any(name in fused.parts for fused in family.fused for name in names.inputs):
        block.mlp = SplitMlp(block.mlp)
    like = next(block.parameters())
    shapes = {**{name: (hidden, width) for name in names.inputs}, names.down: (width, hidden)}
    for name, (inputs, outputs) in shapes.items():
        bias = family.has_bias(name, settings)
        block.set_submodule(name, nn.Linear(inputs, outputs, bias=bias, dtype=like.dtype, device=like.device))
