"""A stock block's weights by head, as writable views. Written per family from transformers' modelling code alone."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from preflight.families import Dimensions


@dataclass
class Views:
    """`query`, `key`, `value`: weight `[heads, head_dim, hidden]` and bias `[heads, head_dim]` or None."""

    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    output: Tensor  # [hidden, heads, head_dim]
    mlps: list[tuple[Tensor, Tensor]]  # of each expert: up [mlp_width, hidden], down [hidden, mlp_width]


def views(kind: str, block: Any, size: Dimensions) -> Views:
    """The views of one block of a loaded stock model."""
    return {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "phi3": _phi3}.get(kind, _plain)(block, size)


def by_head(weight: Tensor, size: Dimensions) -> Tensor:
    return weight.view(-1, size.head_dim, *weight.shape[1:])


def _plain(block: Any, size: Dimensions) -> Views:
    attention = block.self_attn
    linears = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    parts = [
        (by_head(one.weight.data, size), None if one.bias is None else by_head(one.bias.data, size)) for one in linears
    ]
    output = next(getattr(attention, name) for name in ("o_proj", "dense", "out_proj") if hasattr(attention, name))
    mlp = getattr(block, "mlp", block)
    if hasattr(mlp, "experts"):
        ups = mlp.experts.gate_up_proj.data[:, mlp.experts.gate_up_proj.shape[1] // 2 :]
        mlps = list(zip(ups, mlp.experts.down_proj.data, strict=True))
    else:
        up, down = (mlp.up_proj, mlp.down_proj) if hasattr(mlp, "up_proj") else (mlp.fc1, mlp.fc2)
        mlps = [(up.weight.data, down.weight.data)]
    return Views(*parts, output.weight.data.view(size.hidden, -1, size.head_dim), mlps)


def _phi3(block: Any, size: Dimensions) -> Views:
    fused, width = by_head(block.self_attn.qkv_proj.weight.data, size), block.mlp.down_proj.in_features
    heads = size.heads
    parts = (fused[:heads], fused[heads : heads + size.kv_heads], fused[heads + size.kv_heads :])
    output = block.self_attn.o_proj.weight.data.view(size.hidden, heads, size.head_dim)
    up = block.mlp.gate_up_proj.weight.data[width:]
    return Views(*((part, None) for part in parts), output, [(up, block.mlp.down_proj.weight.data)])


def _gpt2(block: Any, size: Dimensions) -> Views:
    weight, bias = block.attn.c_attn.weight.data.T, block.attn.c_attn.bias.data
    three = [slice(n * size.hidden, (n + 1) * size.hidden) for n in range(3)]
    parts = [(weight[part].unflatten(0, (size.heads, -1)), by_head(bias[part], size)) for part in three]
    output = block.attn.c_proj.weight.data.T.unflatten(1, (size.heads, -1))
    return Views(*parts, output, [(block.mlp.c_fc.weight.data.T, block.mlp.c_proj.weight.data.T)])


def _gpt_neox(block: Any, size: Dimensions) -> Views:
    fused = block.attention.query_key_value
    weight = fused.weight.data.view(size.heads, 3, size.head_dim, size.hidden)
    bias = None if fused.bias is None else fused.bias.data.view(size.heads, 3, size.head_dim)
    parts = [(weight[:, n], None if bias is None else bias[:, n]) for n in range(3)]
    output = block.attention.dense.weight.data.view(size.hidden, size.heads, size.head_dim)
    return Views(*parts, output, [(block.mlp.dense_h_to_4h.weight.data, block.mlp.dense_4h_to_h.weight.data)])
