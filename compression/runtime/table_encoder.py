"""The table encoder of TableGPT2: from the texts of a table's cells to three decoder positions per column.

Source: the encoder of the paper (arXiv 2411.02059), as its public code computes it. Two things there are easily done
"right" and then wrong: the residual of every half is the *normalised* input, f(LN(x)) + LN(x), and cells have no
positions, so that the order of rows means nothing.

What differs from the public code, with the same outputs: cells are encoded as they are, neither padded to a grid of
50 × 100 nor to 64 tokens; and the summary's queries, which are weights, are multiplied into its keys (see
`ColumnSummary`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

CELLS_AT_ONCE = 256  # texts per pass of the sentence encoder: bounds memory for wide tables
LEAST_LENGTH = 1e-12


class GridAttention(nn.Module):
    """Self-attention along one axis of a table, without positions; every other axis is a batch."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        """Make it for states of `width`."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map `[others, length, width]` to the same shape; attends along `length`."""
        normed = self.norm(states)
        split = (
            self.query_key_value(normed).unflatten(-1, (3, self.heads, -1)).transpose(-2, -4)
        )  # [.., heads, 3, n, d]
        query, key, value = split.unbind(-3)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.output(mixed.transpose(-2, -3).flatten(-2)) + normed
        return result


class GatedMlp(nn.Module):
    """down(value · gelu(gate)) with value and gate of the normalised input, which is the residual too."""

    def __init__(self, width: int) -> None:
        """Make it for states of `width`, four times as wide inside."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape."""
        normed = self.norm(states)
        value, gate = self.up(normed).chunk(2, dim=-1)
        result: Tensor = self.down(value * functional.gelu(gate)) + normed
        return result


class GridBlock(nn.Module):
    """Attention among the cells of a row, then among those of a column, each with its MLP."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        """Make both halves."""
        super().__init__()
        self.across = GridAttention(width, heads, head_dim)
        self.across_mlp = GatedMlp(width)
        self.down = GridAttention(width, heads, head_dim)
        self.down_mlp = GatedMlp(width)

    def forward(self, cells: Tensor) -> Tensor:
        """Map `[rows, columns, width]` to the same shape."""
        cells = self.across_mlp(self.across(cells)).transpose(0, 1)
        result: Tensor = self.down_mlp(self.down(cells)).transpose(0, 1)
        return result


class ColumnSummary(nn.Module):
    """What a few learned queries find in each column.

    A score is q·(W x)/√d with weights q and W: one vector per head and query says the same, (Wᵀq)/√d. `score` has these
    `heads · queries` rows, in that order, in place of the key projection's `heads · head_dim`.
    """

    def __init__(self, cell_width: int, width: int, head_dim: int, queries: int) -> None:
        """Make it for cells of `cell_width` and results of `width`."""
        super().__init__()
        self.heads, self.queries = width // head_dim, queries
        self.score = nn.Linear(cell_width, self.heads * queries, bias=False)
        self.value = nn.Linear(cell_width, width, bias=False)
        self.mlp = GatedMlp(width)

    def forward(self, cells: Tensor) -> Tensor:
        """Map cells `[rows, columns, cell_width]` to `[columns, queries, width]`."""
        chosen = self.score(cells).unflatten(-1, (self.heads, self.queries)).softmax(dim=0)
        value = self.value(cells).unflatten(-1, (self.heads, -1))
        mixed = torch.einsum("rchq,rchd->cqhd", chosen, value).flatten(-2)
        result: Tensor = self.mlp(mixed)
        return result


class CellTableEncoder(nn.Module):
    """Cells → sentence vectors → rows and columns → a few positions per column, as wide as the decoder."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Build it.

        Args:
            settings: `table_encoder` of the configuration: `sentence` (a BERT), `blocks`, `heads`, `head_dim`, `width`
                (of a position), `summary_head_dim`, `queries`.
        """
        super().__init__()
        sentence = BertConfig(**settings["sentence"])
        self.sentence = BertModel(sentence, add_pooling_layer=False)
        self.blocks = nn.ModuleList(
            GridBlock(sentence.hidden_size, settings["heads"], settings["head_dim"]) for _ in range(settings["blocks"])
        )
        self.summary = ColumnSummary(
            sentence.hidden_size, settings["width"], settings["summary_head_dim"], settings["queries"]
        )

    def embed_cells(self, cells: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors `[cells, width]` of texts `[cells, tokens]`: the mean of the tokens that `mask` keeps."""
        vectors = []
        for part, kept in zip(cells.split(CELLS_AT_ONCE), mask.split(CELLS_AT_ONCE), strict=True):
            longest = max(1, int(kept.sum(dim=1).max()))
            part, kept = part[:, :longest], kept[:, :longest]
            states = self.sentence(input_ids=part, attention_mask=kept).last_hidden_state
            weights = kept.unsqueeze(-1).to(states.dtype)
            means = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
            vectors.append(functional.normalize(means, dim=-1, eps=LEAST_LENGTH))
        return torch.cat(vectors)

    def forward(self, cells: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
        """Encode tables of different sizes, each by itself.

        Args:
            cells: `[cells, tokens]` token ids, table after table, row after row.
            mask: `[cells, tokens]`, 1 where a token is; padding is on the right.
            sizes: `[tables, 2]`: rows and columns.

        Returns:
            `[positions, width]`: `queries` per column, table after table.
        """
        sized = [(int(rows), int(columns)) for rows, columns in sizes.tolist()]
        counts = [rows * columns for rows, columns in sized]
        if sum(counts) != len(cells) or not all(counts):
            raise ValueError(f"tables of {sized} rows and columns have {sum(counts)} cells, and {len(cells)} came")
        summaries = []
        for vectors, (rows, columns) in zip(self.embed_cells(cells, mask).split(counts), sized, strict=True):
            table = vectors.unflatten(0, (rows, columns))
            for block in self.blocks:
                table = block(table)
            summaries.append(self.summary(table).flatten(0, 1))
        return torch.cat(summaries)
