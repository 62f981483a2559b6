"""Before and after on held-out text: perplexity, divergence from the original, size. Both models run block by block.

Perplexity is `exp` of the mean negative log likelihood (natural log) over positions 1 … T−1 of each window of T tokens.
Divergence is KL(original ‖ compressed) of the next-token distributions at the same positions, in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from api_schemas.reports import BeforeAfter, Divergence
from compression.core.blockwise import head_rows, run_block_
from compression.core.placement import placed_on
from compression.core.protocols import Streamed
from compression.core.streamed_model import StreamedModel
from compression.core.timeline import span


@dataclass(frozen=True)
class Quality:
    """How the compressed model compares with the original on the evaluation text."""

    perplexity: BeforeAfter
    divergence: Divergence


@torch.inference_mode()
def final_states(model: Streamed, windows: Tensor, done: Callable[[int], None]) -> Tensor:
    """Hidden states `[windows, tokens, hidden]` after the last block, before the final norm."""
    hidden = model.embed(windows)
    for index in range(model.blocks):
        run_block_(model, model.block(index, model.block_state(index)), index, hidden)
        done(index)
    return hidden


@torch.inference_mode()
def mean_loss(model: Streamed, hidden: Tensor, windows: Tensor) -> float:
    """Mean next-token loss in nats over positions 1 … T−1, from hidden states `[windows, tokens, hidden]`.

    Args:
        model: whose final norm and head are applied.
        hidden: after the last block.
        windows: the token ids, `[windows, tokens]`.
    """
    targets, states = windows[:, 1:].reshape(-1).to(model.device), hidden[:, :-1].reshape(-1, hidden.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    with model.head() as head:
        for start in range(0, len(targets), head_rows()):
            rows = slice(start, start + head_rows())
            logs = _log_probabilities(head, states[rows])
            total -= logs.gather(1, targets[rows, None]).sum(dtype=torch.float64)
    return float(total) / len(targets)


@torch.inference_mode()
def compare(
    original: StreamedModel, compressed: StreamedModel, windows: Tensor, done: Callable[[str, int], None]
) -> Quality:
    """Run both models over the same windows and compare their predictions.

    Args:
        original: the model before.
        compressed: the model after.
        windows: `[windows, tokens]` token ids.
        done: called with `before` or `after` and each finished block's index.

    Returns:
        Perplexities, mean and 99th-percentile KL divergence, and the share of positions with the same best token.
    """
    with placed_on(original.device):
        losses, divergence, agreed, count = _judged(original, compressed, windows, done)
    perplexities = (losses / count).exp()
    return Quality(
        perplexity=BeforeAfter(before=float(perplexities[0]), after=float(perplexities[1])),
        divergence=Divergence(
            mean_kl=float(divergence.mean()),
            kl_99th_percentile=float(torch.quantile(divergence, 0.99)),
            top1_agreement=agreed / count,
        ),
    )


def _judged(
    original: StreamedModel, compressed: StreamedModel, windows: Tensor, done: Callable[[str, int], None]
) -> tuple[Tensor, Tensor, int, int]:
    """Summed losses of both `[2]`, divergence at each position, at how many both name the same token, of how many."""
    before = final_states(original, windows, lambda index: done("before", index))
    after = final_states(compressed, windows, lambda index: done("after", index))
    targets = windows[:, 1:].reshape(-1).to(original.device)
    before, after = (hidden[:, :-1].reshape(-1, hidden.shape[-1]) for hidden in (before, after))
    losses = torch.zeros(2, dtype=torch.float64)
    divergences, agreed = [], 0
    with original.head() as head_before, compressed.head() as head_after:
        for start in range(0, len(targets), head_rows()):
            rows = slice(start, start + head_rows())
            p, q = (
                _log_probabilities(head, hidden[rows]) for head, hidden in ((head_before, before), (head_after, after))
            )
            wanted = targets[rows, None]
            losses -= torch.stack([log.gather(1, wanted).sum(dtype=torch.float64) for log in (p, q)])
            divergences.append((p.exp() * (p - q)).sum(dim=1, dtype=torch.float64))
            agreed += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
    return losses, torch.cat(divergences).clamp_min(0), agreed, len(targets)


def _log_probabilities(head: nn.Module, hidden: Tensor) -> Tensor:
    """Log-probabilities `[rows, vocabulary]` of the next token, float32."""
    with span("evaluate", "head"):
        return torch.log_softmax(head(hidden), dim=-1)
