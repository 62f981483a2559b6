"""The parts of mPLUG-2 that are BERT layers with something else to look at: readers of text or vision, and fusion."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class NormedAttention(nn.Module):
    """LN(attention + input), to the input's own tokens or to another's."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        """Make it for states of `width`."""
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, states: Tensor, others: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape.

        Args:
            states: ask.
            others: `[batch, length, width]` that are asked; None for `states` themselves.
            mask: `[batch, 1, 1, length]`, true where a token may be seen; None where all may.
        """
        asked = states if others is None else others
        query, key, value = (
            linear(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, source in ((self.query, states), (self.key, asked), (self.value, asked))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = self.norm(self.output(mixed.transpose(1, 2).flatten(-2)) + states)
        return result


class NormedMlp(nn.Module):
    """LN(mlp + input)."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        """Make it for states of `width`."""
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, states: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape."""
        result: Tensor = self.norm(self.down(functional.gelu(self.up(states))) + states)
        return result


class ReadingLayer(nn.Module):
    """A BERT layer; `crossing` ones can look at other tokens between attention and MLP."""

    def __init__(self, text: Mapping[str, Any], *, crossing: bool) -> None:
        """Make it by `text` of the configuration: `width`, `heads`, `inner`, `eps`."""
        super().__init__()
        self.attention = NormedAttention(text["width"], text["heads"], text["eps"])
        self.crossing = NormedAttention(text["width"], text["heads"], text["eps"]) if crossing else None
        self.mlp = NormedMlp(text["width"], text["inner"], text["eps"])

    def forward(self, states: Tensor, others: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape; looks at `others` where they are given."""
        states = self.attention(states, mask=mask)
        if others is not None and self.crossing is not None:
            states = self.crossing(states, others)
        result: Tensor = self.mlp(states)
        return result


class TextEmbeddings(nn.Module):
    """BERT's: words, positions and the first token type, normed."""

    def __init__(self, text: Mapping[str, Any]) -> None:
        """Make them by `text` of the configuration: `vocabulary`, `positions`, `types`, `width`, `eps`."""
        super().__init__()
        self.words = nn.Embedding(text["vocabulary"], text["width"])
        self.positions = nn.Embedding(text["positions"], text["width"])
        self.types = nn.Embedding(text["types"], text["width"])
        self.norm = nn.LayerNorm(text["width"], eps=text["eps"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids `[batch, tokens]` to `[batch, tokens, width]`."""
        states = self.words(tokens) + self.types.weight[0]
        result: Tensor = self.norm(states + self.positions.weight[: tokens.shape[1]])
        return result


class Reader(nn.Module):
    """The text encoder whose last two layers read vision as well.

    A checkpoint for captions has these two alone: `text["layers"]` is 2 and there are no embeddings.
    """

    def __init__(self, text: Mapping[str, Any], *, reads_text: bool) -> None:
        """Make it by `text` of the configuration: also `layers` and `latents`."""
        super().__init__()
        self.embeddings = TextEmbeddings(text) if reads_text else None
        count = text["layers"]
        self.layers = nn.ModuleList(ReadingLayer(text, crossing=index >= count - 2) for index in range(count))
        self.latents = nn.Parameter(torch.zeros(text["latents"], text["width"]))

    def read_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map ids `[batch, tokens]` with a mask `[batch, 1, 1, tokens]` to `[batch, tokens, width]`.

        Raises:
            ValueError: this checkpoint has no text embeddings.
        """
        if self.embeddings is None:
            raise ValueError("this checkpoint is for captions: it reads no text")
        states = self.embeddings(tokens)
        for layer in self.layers:
            states = layer(states, mask=mask)
        result: Tensor = states
        return result

    def read_vision(self, vision: Tensor) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape: latents look at it, then it looks at them."""
        latents = self.latents.expand(len(vision), -1, -1)
        result: Tensor = self.layers[-1](vision, self.layers[-2](latents, vision))
        return result
