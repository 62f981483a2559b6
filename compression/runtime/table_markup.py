"""The other table encoder published with TableGPT2: a code encoder reads the table as Markdown, one position per token.

The encoder is that of CodeT5+ (a GPT-J without a causal mask): attention and MLP side by side on one norm, rotary
positions on neighbouring channels of the first `rotary` of each head. Query, key and value are three linears here; the
public weights interleave them in four groups (the importer sorts them).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 10000.0


def _rotated(states: Tensor, rotary: int) -> Tensor:
    """Turn channels 2i and 2i+1 of `[..., length, head_dim]` by position · base^(−2i/rotary)."""
    length = states.shape[-2]
    steps = torch.arange(0, rotary, 2, device=states.device, dtype=torch.float32)
    angles = torch.arange(length, device=states.device, dtype=torch.float32)[:, None] / ROTARY_BASE ** (steps / rotary)
    sine, cosine = angles.sin().to(states.dtype), angles.cos().to(states.dtype)
    even, odd = states[..., :rotary:2], states[..., 1:rotary:2]
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)
    return torch.cat((turned, states[..., rotary:]), dim=-1)


class CodeBlock(nn.Module):
    """x + attention(LN(x)) + mlp(LN(x)), every token seeing every other."""

    def __init__(self, width: int, heads: int, rotary: int, eps: float) -> None:
        """Make it for states of `width`."""
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm = nn.LayerNorm(width, eps=eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map `[length, width]` to the same shape."""
        normed = self.norm(states)
        query, key, value = (
            linear(normed).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for linear in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(
            _rotated(query, self.rotary)[None], _rotated(key, self.rotary)[None], value[None]
        )[0]
        units = functional.gelu(self.up(normed), approximate="tanh")
        result: Tensor = self.output(mixed.transpose(0, 1).flatten(-2)) + self.down(units) + states
        return result


class MarkupTableEncoder(nn.Module):
    """Markdown tokens → states, one per token."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Build it.

        Args:
            settings: `table_encoder` of the configuration: `vocabulary`, `width`, `blocks`, `heads`, `rotary`, `eps`.
        """
        super().__init__()
        width = settings["width"]
        self.tokens = nn.Embedding(settings["vocabulary"], width)
        self.blocks = nn.ModuleList(
            CodeBlock(width, settings["heads"], settings["rotary"], settings["eps"]) for _ in range(settings["blocks"])
        )
        self.norm = nn.LayerNorm(width, eps=settings["eps"])

    def forward(self, cells: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
        """Encode tables of different lengths, each by itself.

        Args:
            cells: `[tables, tokens]` ids of each table's Markdown.
            mask: `[tables, tokens]`, 1 where a token is; padding is on the right.
            sizes: `[tables, 2]`; Markdown says itself where rows end, so that their number counts alone.

        Returns:
            `[positions, width]`, table after table, without padding.
        """
        if len(sizes) != len(cells):
            raise ValueError(f"{len(sizes)} tables are announced, and {len(cells)} came")
        encoded = []
        for tokens, length in zip(cells, mask.sum(dim=1).tolist(), strict=True):
            states = self.tokens(tokens[:length])
            for block in self.blocks:
                states = block(states)
            encoded.append(self.norm(states))
        return torch.cat(encoded)
