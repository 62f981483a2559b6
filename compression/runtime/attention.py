"""Attention with fewer channels per head than the original: what layout `full` needs to run.

Differences from stock rotate-half attention:

- query and key have `query_key_rank` channels per head, the kept rotary pairs of each key/value head stored in the
  buffer `rotary_pairs [kv_heads, query_key_rank // 2]`; channels are ordered [first halves | second halves];
- value and output have `value_output_rank` channels per head;
- logits are scaled by the **original** head size, since they approximate the original logits (modegpt paper, sec. 3).
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half


class ReducedAttention(nn.Module):
    """Grouped-query attention with reduced ranks; takes the place of a stock `self_attn`."""

    rotary_pairs: torch.Tensor

    def __init__(self, stock: Any, query_key_rank: int, value_output_rank: int) -> None:
        """Build it in the shape of `stock` (whose linears say hidden size and biases), uninitialised.

        Args:
            stock: the attention module it replaces; only its shapes and settings are read.
            query_key_rank: channels per head of query and key, even.
            value_output_rank: channels per head of value and output.
        """
        super().__init__()
        self.config = stock.config
        self.layer_idx = stock.layer_idx
        self.head_dim = stock.head_dim
        self.scaling = stock.scaling
        self.is_causal = True
        self.num_key_value_groups = stock.num_key_value_groups
        self.sliding_window = getattr(stock, "sliding_window", None)
        self.query_key_rank, self.value_output_rank = query_key_rank, value_output_rank
        hidden = stock.q_proj.in_features
        heads = stock.q_proj.out_features // stock.head_dim
        kv_heads = stock.k_proj.out_features // stock.head_dim
        like = {"dtype": stock.q_proj.weight.dtype, "device": stock.q_proj.weight.device}
        self.q_proj = nn.Linear(hidden, heads * query_key_rank, bias=stock.q_proj.bias is not None, **like)
        self.k_proj = nn.Linear(hidden, kv_heads * query_key_rank, bias=stock.k_proj.bias is not None, **like)
        self.v_proj = nn.Linear(hidden, kv_heads * value_output_rank, bias=stock.v_proj.bias is not None, **like)
        self.o_proj = nn.Linear(heads * value_output_rank, hidden, bias=stock.o_proj.bias is not None, **like)
        pairs = torch.arange(query_key_rank // 2, device=like["device"]).expand(kv_heads, -1).clone()
        self.register_buffer("rotary_pairs", pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; same contract as the stock module.

        Args:
            hidden_states: `[batch, tokens, hidden]`.
            position_embeddings: cosines and sines of the original head size, each `[batch, tokens, head_dim]`.
            attention_mask: as the stock attention interfaces take it; None is causal.
            cache: key/value cache, or None (`past_key_values` is its older name).
            past_key_values: see `cache`.
            kwargs: handed to the attention interface.
        """
        cache = cache if cache is not None else past_key_values
        batch, tokens, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, tokens, -1, self.query_key_rank).transpose(1, 2)
        key = self.k_proj(hidden_states).view(batch, tokens, -1, self.query_key_rank).transpose(1, 2)
        value = self.v_proj(hidden_states).view(batch, tokens, -1, self.value_output_rank).transpose(1, 2)
        cos, sin = (self._of_kept_pairs(angle) for angle in position_embeddings)
        key = key * cos + rotate_half(key) * sin
        groups = self.num_key_value_groups
        cos, sin = cos.repeat_interleave(groups, dim=1), sin.repeat_interleave(groups, dim=1)
        query = query * cos + rotate_half(query) * sin
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(mixed.reshape(batch, tokens, -1)), weights

    def _of_kept_pairs(self, angle: torch.Tensor) -> torch.Tensor:
        """Gather `[batch, tokens, head_dim]` into `[batch, kv_heads, tokens, query_key_rank]`."""
        kept = angle[..., self.rotary_pairs].transpose(1, 2)
        return torch.cat((kept, kept), dim=-1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call the configured kernel, padding the narrower of key and value: fused kernels want equal widths."""
        width = max(self.query_key_rank, self.value_output_rank)
        query, key, value = (nn.functional.pad(states, (0, width - states.shape[-1])) for states in (query, key, value))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return mixed[..., : self.value_output_rank], weights
