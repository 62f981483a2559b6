"""The parts of a language model as torch modules to be traced, each with its weights among its inputs.

Weights that are inputs cannot be folded into constants, so one trace serves all blocks of a kind.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED = "modepress_grouped"
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # as the blocks of transformers' families call it


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention whose query heads share keys and values by reshaping, so that the cache is never copied per head.

    Args:
        module: the attention module.
        query: `[batch, heads, tokens, channels]`.
        key: `[batch, kv_heads, total, channels]`.
        value: `[batch, kv_heads, total, value channels]`.
        attention_mask: added to the scores, `[1, 1, tokens, total]`.
        scaling: of the scores; None is 1/√channels.
        softcap: c in `c tanh(score / c)`, before the mask.
        kwargs: what other kernels want and this one does not.

    Returns:
        `[batch, tokens, heads, value channels]`, and no weights.
    """
    del module, kwargs
    heads, tokens, channels = query.shape[1:]
    kv_heads = key.shape[1]
    shared = query.reshape(-1, kv_heads, heads // kv_heads * tokens, channels)
    factor = channels**-0.5 if scaling is None else scaling
    scores = torch.matmul(shared * factor, key.transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (heads // kv_heads, tokens)) + attention_mask[:, :, None]
    weights = torch.softmax(scores, dim=-1).flatten(2, 3)
    mixed = torch.matmul(weights, value).reshape(-1, heads, tokens, value.shape[-1])
    return mixed.transpose(1, 2), None


class Product(nn.Module):
    """A linear whose weight is `[inputs, outputs]`, as MatMul takes it."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take the place of `linear`, uninitialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.in_features, linear.out_features))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(linear.out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        product = torch.matmul(inputs, self.weight)
        return product if self.bias is None else product + self.bias


class _OneCache:
    """The cache of one block, for as long as it is traced: what was given and what was added."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat((self.keys, keys), dim=2)
        self.values = torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class BlockPart(nn.Module):
    """One decoder block: hidden states and its cache in, both out."""

    def __init__(self, block: nn.Module) -> None:
        """Replace the block's linears, in place; its weights are of no account."""
        super().__init__()
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for name, linear in linears.items():
            block.set_submodule(name, Product(linear))
        self.block = block
        self.state: tuple[str, ...] = tuple(block.state_dict())
        names = inspect.signature(block.forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[1])

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        streams: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map `[batch, tokens, hidden]` to the same shape, with keys and values of all tokens.

        `streams` are the cache's keys and values, then cosines and sines where the block turns by them.
        """
        past_keys, past_values, *angles = streams
        cache = _OneCache(past_keys, past_values)
        given: dict[str, Any] = {"attention_mask": mask, self.cache_name: cache}
        if angles:
            given["position_embeddings"] = tuple(angles)
        if "use_cache" in inspect.signature(self.block.forward).parameters:
            given["use_cache"] = True
        output = functional_call(self.block, dict(zip(self.state, state, strict=True)), (hidden,), given)
        return output[0] if isinstance(output, tuple) else output, cache.keys, cache.values


class FrontPart(nn.Module):
    """What is computed once for all blocks: positions, angles, masks.

    Args:
        rotary: the model's module of angles, or None.
        layer_types: for which it is asked; `(None,)` where it knows only one kind.
        windows: of the masks, None being unlimited.
    """

    def __init__(
        self, rotary: nn.Module | None, layer_types: tuple[str | None, ...], windows: tuple[int | None, ...]
    ) -> None:
        super().__init__()
        self.rotary, self.layer_types, self.windows = rotary, layer_types, windows

    def forward(self, hidden: Tensor, past_key: Tensor) -> tuple[Tensor, ...]:
        """Positions `[tokens]`, masks `[1, 1, tokens, total]` by window, then cos and sin by layer type."""
        past, tokens = past_key.shape[2], hidden.shape[1]
        own = torch.arange(tokens) + past
        distance = own[:, None] - torch.arange(past + tokens)[None, :]
        masks = []
        for window in self.windows:
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            masks.append(torch.zeros(1).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None])
        angles: list[Tensor] = []
        if self.rotary is not None:
            for kind in self.layer_types:
                angles += self.rotary(hidden[:1], own[None], *(() if kind is None else (kind,)))
        return (own, *masks, *angles)


class NormPart(nn.Module):
    """The final norm."""

    def __init__(self, norm: nn.Module) -> None:
        """Take a module whose weights are of no account."""
        super().__init__()
        self.norm = norm
        self.state: tuple[str, ...] = tuple(norm.state_dict())

    def forward(self, hidden: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Map `[batch, kept, hidden]` to the same shape."""
        result: Tensor = functional_call(self.norm, dict(zip(self.state, state, strict=True)), (hidden,))
        return result


@contextmanager
def grouped(config: Any) -> Iterator[None]:
    """Let the blocks of a configuration attend by `grouped_attention` for a while."""
    ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
    before = config._attn_implementation
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before
