"""The two streams of mode refined, and what the re-fits of a block's output linears aim at in them.

x is the original's stream, y the compressed model's. A half adds to the stream what its output linear L says of its
inputs a, times a scale s, in some families through a norm P. The aim t of the re-fit, where `refit` corrects errors:

    plain        y⁻ + s·L(a) = x⁺           t = (x⁺ − y⁻)/s, where y⁻ is the stream without the half, x⁺ the original
                                            after it; in a parallel block y⁻ has the other half in it
    post-norm    y⁻ + P(L(a)) = x⁺          has no linear solution, since P sets the length. With u what the original
                                            said of x, ρ its length and g the norm's gain, P moves by g δ/ρ when u moves
                                            by δ. t = u + ρ g (x⁺ − y⁻ − P(u)) / (g² + ε mean g²): channel by channel
                                            the δ that brings the stream back, damped where the norm lets little pass
    experts      y⁻ + s·Σ w_e L_e(a_e) = x⁺ each expert's own output and its share of what their sum lacks
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from compression.core.halves import Halves
from compression.core.parallel import WHOLE, Share
from compression.core.refit import Folds, Refitted
from compression.core.sensitivity import Metrics
from compression.core.streamed_model import StreamedModel
from compression.methods.modegpt import Modegpt

METRIC_FLOOR = 1e-6  # of the mean diagonal: directions the loss never minded on the sample still count for something
HALVES = ("attention", "mlp")
POST_NORM_DAMPING = 0.1  # ε: a channel whose squared gain is far below the mean's tenth is left as it was


class Streams:
    """Hidden states of both models at one block, and what both halves' solvers need of the model around them.

    Attributes:
        original: x after the block, once its pass is done; before it, x before the block.
        middle: x where the original's MLP reads it.
        compressed: y before the block; half way through it once attention is solved, in a sequential block.
        said: in families with post-norms, what each half's output linear says of the original stream.
        norms: and those norms, of the block at hand.
    """

    def __init__(
        self,
        model: StreamedModel,
        method: Modegpt,
        hidden: Tensor,
        metrics: Callable[[int], Metrics | None],
        share: Share = WHOLE,
    ) -> None:
        """Start both streams at the embeddings.

        Args:
            model: the original.
            method: shapes, names and the choice of rotary pairs.
            hidden: `[windows, tokens, hidden]`, taken over.
            metrics: of each block; None where the recipe measures plainly.
            share: which part of all windows `hidden` is.
        """
        self.model, self.method, self.metrics, self.share = model, method, metrics, share
        self.family, self.size, self.halves = method.family, method.size, Halves(model)
        self.config: ModegptConfig = method.config
        self.original, self.compressed, self.middle = hidden, hidden.clone(), torch.empty_like(hidden)
        post_norms = dict(zip(HALVES, method.family.post_norms, strict=False))
        self.post_norms: dict[str, str] = post_norms
        self.said = {half: torch.empty_like(hidden) for half in post_norms}
        self.norms: dict[str, nn.Module] = {}

    def goal(self, half: str) -> Tensor:
        """The original stream where the effect of a half is judged."""
        return self.middle if half == "attention" and not self.halves.parallel else self.original

    def aim(self, half: str, part: slice, rest: Tensor) -> tuple[Tensor, Tensor]:
        """What a half should say, `[windows, tokens, hidden]`, and the tokens' weights `[windows, tokens, 1]`.

        Args:
            half: `attention` or `mlp`.
            part: the windows.
            rest: the compressed stream of these windows without this half.
        """
        goal = self.goal(half)[part]
        weights = token_weights(goal)
        if half in self.said:
            said, norm = self.said[half][part], self.norms[half]
            shorter = token_weights(said)  # the norm divides by the length of what is said
            return said + through_norm(norm, goal - rest - norm(said)) / shorter, weights * shorter
        return (goal - rest) / self.halves.scale, weights

    def target(self, aim: Tensor, inputs: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """The aim, or with refit `local` only what the linear said of these inputs."""
        return aim if self.config.refits == "error_corrected" else says(inputs, W, bias)

    def narrow(self, index: int, state: dict[str, Tensor], **whole: int) -> nn.Module:
        """The block with these tensors in its planned shape; `whole` names widths that are not narrowed yet."""
        shape: BlockShape = self.method.shapes[index].model_copy(update=whole)
        return self.model.resized_block(index, state, shape.model_dump(), self.method.scaling(index))


def correct_inputs(
    new: dict[str, Tensor], linears: tuple[str, ...], folds: Folds, ridge: float | None
) -> list[Refitted]:
    """Re-fit linears that read the stream, in place: from n(y), say what the original says of n(x)."""
    solves: list[Refitted] = []
    for linear in linears:
        W, b = weight_and_bias(new, linear)
        solves.append(folds.towards(W, b).refit(W, b, ridge, like=solves[-1] if solves else None))
        store(new, linear, solves[-1])
    return solves


def through_norm(norm: nn.Module, wanted: Tensor) -> Tensor:
    """What has to be added before an RMS norm, in lengths of its input, for about `wanted` to be added after it."""
    gain = norm(torch.ones_like(wanted[..., :1, :]))
    return wanted * gain / (gain.square() + POST_NORM_DAMPING * gain.square().mean())


def token_weights(stream: Tensor) -> Tensor:
    """One over the root mean square of the original stream at each token, `[..., 1]`.

    The next norm divides by it, so an error counts relative to it. Without this the few tokens with massive
    activations (the first of a text, mostly) outweigh all others in every sum of squares.
    """
    return stream.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()


def says(inputs: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear says of `[..., in_features]`, in the inputs' dtype."""
    return nn.functional.linear(inputs, W.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))


def weight_and_bias(state: dict[str, Tensor], linear: str) -> tuple[Tensor, Tensor | None]:
    """A linear's tensors in float64."""
    bias = state.get(f"{linear}.bias")
    return state[f"{linear}.weight"].double(), None if bias is None else bias.double()


def store(new: dict[str, Tensor], linear: str, solved: Refitted) -> None:
    """Put a solved linear into the block in storage dtype."""
    new[f"{linear}.weight"] = solved.weight.to(new[f"{linear}.weight"].dtype)
    if solved.bias is not None:
        new[f"{linear}.bias"] = solved.bias.to(new[f"{linear}.bias"].dtype)


def floored(metric: Tensor) -> Tensor:
    """The metric with a little of the identity, so that it has an inverse."""
    identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    return metric + METRIC_FLOOR * metric.diagonal().mean() * identity
