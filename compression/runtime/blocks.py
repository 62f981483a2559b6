"""Narrowing a stock decoder block: attention and MLP in canonical form, of other widths, everything else as it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression.runtime.attention import ReducedAttention
from preflight.families import Family, table

PREFIX = "modepress_"


class SplitMlp(nn.Module):
    """A gated MLP whose gate and up projections are linears of their own; replaces one that fuses them."""

    def __init__(self, activation: nn.Module) -> None:
        """Take the stock MLP's activation; the linears are set by `resize_block_`."""
        super().__init__()
        self.activation = activation
        self.gate_proj = self.up_proj = self.down_proj = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[..., hidden]` to the same shape."""
        units = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        result: Tensor = self.down_proj(units)
        return result


class SplitExperts(nn.ModuleList):
    """Experts as modules of their own; replaces stock ones, which hold the weights of all in one tensor."""

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Add up what the chosen experts say.

        Args:
            hidden_states: `[tokens, hidden]`.
            chosen: `[tokens, k]` numbers of experts.
            weights: `[tokens, k]` of their outputs.
        """
        mixed = torch.zeros_like(hidden_states)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            said = self[number](hidden_states[token]) * weights[token, place, None]
            mixed.index_add_(0, token, said.to(mixed.dtype))
        return mixed


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
    resize_mlp_(block, family, config.to_dict(), shape["mlp_width"])


def resize_mlp_(block: Any, family: Family, settings: Mapping[str, Any], width: int) -> None:
    """Give a block an MLP (or experts) of another width, uninitialised, in place.

    Args:
        block: a stock decoder layer.
        family: its table.
        settings: the model's configuration.
        width: of the MLP, in units.
    """
    size = family.dimensions(settings)
    if family.experts is not None:
        stock = block.get_submodule(family.experts.module)
        block.set_submodule(family.experts.module, SplitExperts(SplitMlp(stock.act_fn) for _ in range(size.experts)))
    elif any(name in fused.parts for fused in family.fused for name in family.mlp.inputs):
        block.mlp = SplitMlp(block.mlp.activation_fn)
    like = next(block.parameters())
    shapes: dict[str, tuple[int, int]] = {}
    for mlp in family.mlps(size):
        shapes.update({**{name: (size.hidden, width) for name in mlp.inputs}, mlp.down: (width, size.hidden)})
    for name, (inputs, outputs) in shapes.items():
        bias = family.has_bias(name, settings)
        block.set_submodule(name, nn.Linear(inputs, outputs, bias=bias, dtype=like.dtype, device=like.device))
