"""Attention in canonical form, with fewer channels per head than the original: what layout `full` needs to run.

Differences from the stock modules it takes the place of:

- query, key, value and output are four ordinary linears, however the checkpoint stores them;
- query and key have `query_key_rank` channels per head. The first are the kept rotary pairs of each key/value head,
  listed in the buffer `rotary_pairs [kv_heads, pairs]` and ordered [first halves | second halves]; the others, where
  there are any, are not rotated;
- value and output have `value_output_rank` channels per head;
- logits are scaled as in the **original**, since they approximate the original logits (modegpt paper, sec. 3).
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from preflight.families import Family


class ReducedAttention(nn.Module):
    """Grouped-query attention with reduced ranks; its linears have the names that the family's table gives them."""

    rotary_pairs: torch.Tensor

    def __init__(self, stock: Any, family: Family, query_key_rank: int, value_output_rank: int) -> None:
        """Build it in the shape of `stock` (whose configuration says sizes and biases), uninitialised.

        Args:
            stock: the attention module it replaces; only its settings and its per-head norms are taken.
            family: the stock module's table.
            query_key_rank: channels per head of query and key; all of them where they are normalised per head.
            value_output_rank: channels per head of value and output.
        """
        super().__init__()
        settings = stock.config.to_dict()
        size = family.dimensions(settings)
        self.config, self.layer_idx, self.stock_module = stock.config, stock.layer_idx, type(stock).__module__
        self.head_dim, self.scaling, self.is_causal = size.head_dim, stock.scaling, True
        self.num_key_value_groups = size.group
        self.sliding_window = getattr(stock, "sliding_window", getattr(stock.config, "sliding_window", None))
        cap = getattr(stock.config, family.attention_cap) if family.attention_cap else None
        self.capping = {} if cap is None else {"softcap": cap}
        self.query_key_rank, self.value_output_rank = query_key_rank, value_output_rank
        like = next(stock.parameters())
        names = family.attention
        widths = {
            names.query: (size.hidden, size.heads * query_key_rank),
            names.key: (size.hidden, size.kv_heads * query_key_rank),
            names.value: (size.hidden, size.kv_heads * value_output_rank),
            names.output: (size.heads * value_output_rank, size.hidden),
        }
        for name, (inputs, outputs) in widths.items():
            bias = family.has_bias(name, settings)
            linear = nn.Linear(inputs, outputs, bias=bias, dtype=like.dtype, device=like.device)
            self.add_module(_leaf(name), linear)
        self.query, self.key, self.value, self.output = map(_leaf, widths)
        self.norms: tuple[str, ...] = ()
        if family.has_qk_norm(settings):
            self.norms = (_leaf(names.query_norm), _leaf(names.key_norm))
            for norm in self.norms:
                self.add_module(norm, stock.get_submodule(norm))
        self.rotary_rank = size.rotary_rank(stock.layer_idx, query_key_rank)
        if self.rotary_rank:
            pairs = torch.arange(self.rotary_rank // 2, device=like.device).expand(size.kv_heads, -1).clone()
            self.register_buffer("rotary_pairs", pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; same contract as the stock modules.

        Args:
            hidden_states: `[batch, tokens, hidden]`.
            position_embeddings: cosines and sines of the original rotary width, each `[batch, tokens, width]`; None
                where the family has none.
            attention_mask: as the stock attention interfaces take it; None is causal.
            cache: key/value cache, or None.
            past_key_values: older name of `cache`.
            layer_past: GPT-NeoX's name of `cache`.
            kwargs: handed to the attention interface.
        """
        cache = next((one for one in (cache, past_key_values, layer_past) if one is not None), None)
        query = self._heads(self.query, hidden_states, self.query_key_rank)
        key = self._heads(self.key, hidden_states, self.query_key_rank)
        value = self._heads(self.value, hidden_states, self.value_output_rank).transpose(1, 2)
        if self.norms:
            query, key = self.get_submodule(self.norms[0])(query), self.get_submodule(self.norms[1])(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotary_rank and position_embeddings is not None:
            cos, sin = (self._of_kept_pairs(angle) for angle in position_embeddings)
            key = self._rotate(key, cos, sin)
            grouped = query.unflatten(1, (-1, self.num_key_value_groups))
            query = self._rotate(grouped, cos[:, :, None], sin[:, :, None]).flatten(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.get_submodule(self.output)(mixed.reshape(*hidden_states.shape[:-1], -1)), weights

    def _heads(self, linear: str, hidden_states: torch.Tensor, rank: int) -> torch.Tensor:
        """Apply a linear and part its outputs by heads: `[batch, tokens, heads, rank]`."""
        states: torch.Tensor = self.get_submodule(linear)(hidden_states)
        return states.view(*hidden_states.shape[:-1], -1, rank)

    def _of_kept_pairs(self, angle: torch.Tensor) -> torch.Tensor:
        """Gather `[batch, tokens, rotary width]` into `[batch, kv_heads, tokens, rotary_rank]`."""
        kept = angle[..., self.rotary_pairs].transpose(1, 2)
        return torch.cat((kept, kept), dim=-1)

    def _rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn the first `rotary_rank` channels and leave the others alone."""
        turned, still = states[..., : self.rotary_rank], states[..., self.rotary_rank :]
        turned = turned * cos + rotate_half(turned) * sin
        return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call the configured kernel, padding the narrower of key and value: fused kernels want equal widths."""
        width = max(self.query_key_rank, self.value_output_rank)
        query, key, value = (_padded(states, width) for states in (query, key, value))
        implementation = self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self._eager())
        mixed, weights = interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.capping,
            **kwargs,
        )
        return mixed[..., : self.value_output_rank], weights

    def _eager(self) -> Any:
        """The plain kernel of the family's own module: they differ in caps and in how groups are spread."""
        return sys.modules[self.stock_module].eager_attention_forward


def _padded(states: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros up to `width` channels; padding by nothing would copy the whole cache for every token."""
    lacking = width - states.shape[-1]
    return nn.functional.pad(states, (0, lacking)) if lacking else states


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
