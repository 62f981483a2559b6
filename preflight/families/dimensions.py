"""The sizes of one model, and which channels of a head the position turns in which block."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one model, in channels unless said otherwise.

    Attributes:
        rotary_width: channels at the start of a head that rotary embedding turns, in pairs (j, j + rotary_width / 2).
        attention_scale: factor of the attention logits `q · k`.
        qk_norm: whether queries and keys are normalised per head, which ties all channels of a head together.
        rotates: per block, whether it has rotary embedding at all; None where all have.
        unrotated_every: every so many blocks one has none; 0 for never. `rotates` goes first.
        experts: MLPs side by side in one block; 1 without a router.
        routed: of these, how many each token sees.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    blocks: int
    vocabulary: int
    tied_head: bool
    rotary_width: int
    attention_scale: float
    qk_norm: bool = False
    rotates: Sequence[int] | None = None
    unrotated_every: int = 0
    experts: int = 1
    routed: int = 1

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def unrotated_channels(self) -> bool:
        """Whether any block has query-key channels without rotary embedding."""
        return self.rotary_width < self.head_dim or self.rotates is not None or self.unrotated_every > 0

    def rotary_in(self, block: int) -> int:
        """Rotated channels per head of one block."""
        if self.rotates is not None:
            return self.rotary_width if self.rotates[block] else 0
        unrotated = self.unrotated_every and (block + 1) % self.unrotated_every == 0
        return 0 if unrotated else self.rotary_width

    def rotary_rank(self, block: int, rank: int) -> int:
        """How many of `rank` kept channels are rotated ones: even, in the original proportion as nearly as can be.

        >>> half = Dimensions(32, 4, 4, 8, 48, 2, 100, False, 4, 1.0)
        >>> [half.rotary_rank(0, rank) for rank in (8, 6, 5, 2, 1)]
        [4, 2, 2, 0, 0]
        """
        width = self.rotary_in(block)
        even = 2 * round(rank * width / (2 * self.head_dim))
        least = width + rank - self.head_dim  # the rest must fit into the channels that are not rotated
        return max(min(even, width, rank - rank % 2), least + least % 2)
