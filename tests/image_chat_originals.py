"""The parts that MiniGPT-4 and what is built on it share, as their authors ship and run them: files and plain torch.

Nothing here comes from the code under test: names, orders of rows and epsilons are those of the authors' own programs
(EVA ViT-g of LAVIS, BLIP-2's Q-Former), run in float64 from the tensors of the files themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from tests.tiny_models import make_tiny_tokenizer

State = dict[str, Tensor]
PATCH, GRID, WIDTH, VIT_HEADS, VIT_BLOCKS, VIT_MLP = 14, 2, 32, 2, 2, 139
Q_WIDTH, Q_HEADS, Q_LAYERS, Q_MLP, QUERIES = 48, 4, 3, 96, 5
HIDDEN = 64
IMAGE = PATCH * GRID


@dataclass
class Originals:
    """A set of files, and what is in them.

    Attributes:
        paths: by role.
        state: what the authors' program would hold, by its names; adapters apart.
        options: what an import needs to be told of these sizes.
    """

    paths: dict[str, Path]
    state: State
    options: dict[str, Any] = field(default_factory=dict)


class Maker:
    """Random tensors with norms away from one and biases away from zero."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def norm(self, name: str, width: int, *, bias: bool = True) -> State:
        made = {f"{name}.weight": 1 + self.normal(width, scale=0.3)}
        return {**made, f"{name}.bias": self.normal(width)} if bias else made

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> State:
        made = {f"{name}.weight": self.normal(outputs, inputs, scale=inputs**-0.5)}
        return {**made, f"{name}.bias": self.normal(outputs)} if bias else made


def make_vit(make: Maker) -> State:
    """`eva_vit_g.pth`: names without a prefix, a key bias nowhere, one block more than is run, a head."""
    state = {
        "cls_token": make.normal(1, 1, WIDTH),
        "pos_embed": make.normal(1, 1 + GRID * GRID, WIDTH),
        "patch_embed.proj.weight": make.normal(WIDTH, 3, PATCH, PATCH, scale=0.04),
        "patch_embed.proj.bias": make.normal(WIDTH),
        **make.norm("norm", WIDTH),
        **make.linear("head", WIDTH, 7),
    }
    for index in range(VIT_BLOCKS):
        block = f"blocks.{index}."
        state |= make.norm(f"{block}norm1", WIDTH) | make.norm(f"{block}norm2", WIDTH)
        state |= make.linear(f"{block}attn.qkv", WIDTH, 3 * WIDTH, bias=False)
        state |= {f"{block}attn.q_bias": make.normal(WIDTH), f"{block}attn.v_bias": make.normal(WIDTH)}
        state |= make.linear(f"{block}attn.proj", WIDTH, WIDTH)
        state |= make.linear(f"{block}mlp.fc1", WIDTH, VIT_MLP) | make.linear(f"{block}mlp.fc2", VIT_MLP, WIDTH)
    return state


def make_q_former(make: Maker) -> State:
    """What a delta carries that trained its Q-Former: no branch for text, a buffer of positions."""
    bert = "Qformer.bert."
    state: State = {
        "query_tokens": make.normal(1, QUERIES, Q_WIDTH),
        **make.norm(f"{bert}embeddings.LayerNorm", Q_WIDTH),
    }
    state[f"{bert}embeddings.position_ids"] = torch.arange(512)[None]
    for index in range(Q_LAYERS):
        layer = f"{bert}encoder.layer.{index}."
        kinds = {"attention": Q_WIDTH, **({"crossattention": WIDTH} if index % 2 == 0 else {})}
        for kind, inputs in kinds.items():
            state |= make.linear(f"{layer}{kind}.self.query", Q_WIDTH, Q_WIDTH)
            state |= make.linear(f"{layer}{kind}.self.key", inputs, Q_WIDTH)
            state |= make.linear(f"{layer}{kind}.self.value", inputs, Q_WIDTH)
            state |= make.linear(f"{layer}{kind}.output.dense", Q_WIDTH, Q_WIDTH)
            state |= make.norm(f"{layer}{kind}.output.LayerNorm", Q_WIDTH)
        state |= make.linear(f"{layer}intermediate_query.dense", Q_WIDTH, Q_MLP)
        state |= make.linear(f"{layer}output_query.dense", Q_MLP, Q_WIDTH)
        state |= make.norm(f"{layer}output_query.LayerNorm", Q_WIDTH)
    return state


def make_blip2(make: Maker) -> State:
    """`blip2_pretrained_flant5xxl.pth`: the Q-Former with its reading of text, and a projection for another model."""
    state = {**make.norm("ln_vision", WIDTH), **make_q_former(make), **make.linear("t5_proj", Q_WIDTH, 20)}
    bert = "Qformer.bert."
    state[f"{bert}embeddings.word_embeddings.weight"] = make.normal(30, Q_WIDTH)
    state[f"{bert}embeddings.position_embeddings.weight"] = make.normal(512, Q_WIDTH)
    state |= make.linear("Qformer.cls.predictions.transform.dense", Q_WIDTH, Q_WIDTH)
    for index in range(Q_LAYERS):
        layer = f"{bert}encoder.layer.{index}."
        state |= make.linear(f"{layer}intermediate.dense", Q_WIDTH, Q_MLP)
        state |= make.linear(f"{layer}output.dense", Q_MLP, Q_WIDTH)
        state |= make.norm(f"{layer}output.LayerNorm", Q_WIDTH)
    return state


def write_language(folder: Path, config: str, state: Mapping[str, Tensor]) -> None:
    """A folder of a language model in pickled form, with a real tokenizer."""
    folder.mkdir(parents=True)
    make_tiny_tokenizer(folder)
    (folder / "config.json").write_text(config)
    torch.save(dict(state), folder / "pytorch_model.bin")


def save_delta(path: Path, state: Mapping[str, Tensor]) -> None:
    """As the authors' runner saves: two moments for each trained tensor, and what else it knew."""
    trained = [tensor for tensor in state.values() if tensor.is_floating_point()]
    moments = {index: {"step": 1, "exp_avg": t.clone(), "exp_avg_sq": t.clone()} for index, t in enumerate(trained)}
    outer = {
        "model": dict(state),
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-5, "params": list(moments)}]},
        "config": {"run": {"amp": True}},
        "scaler": {"scale": 65536.0},
        "epoch": 4,
    }
    torch.save(outer, path)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """Softmax attention on `[batch, tokens, heads · channels]`."""
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Run:
    """Runs the authors' program on a state in float64."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def see(self, pixels: Tensor) -> Tensor:
        """The ViT, without a norm at its end, then `ln_vision`."""
        state, size = self.state, pixels.shape[-1]
        x = torch.nn.functional.conv2d(
            pixels.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH
        )
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        positions = state["pos_embed"]
        if size != IMAGE:
            old = positions[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2).float()
            new = interpolate(old, size=(size // PATCH, size // PATCH), mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], new.permute(0, 2, 3, 1).flatten(1, 2).double()], dim=1)
        x = x + positions
        for index in range(VIT_BLOCKS):
            block = f"blocks.{index}."
            bias = torch.cat([state[f"{block}attn.q_bias"], torch.zeros(WIDTH), state[f"{block}attn.v_bias"]])
            qkv = linear(self.norm(f"{block}norm1", x, 1e-6), state[f"{block}attn.qkv.weight"], bias)
            x = x + self.linear(f"{block}attn.proj", attention(*qkv.chunk(3, dim=-1), VIT_HEADS))
            x = x + self.linear(
                f"{block}mlp.fc2", gelu(self.linear(f"{block}mlp.fc1", self.norm(f"{block}norm2", x, 1e-6)))
            )
        return self.norm("ln_vision", x, 1e-5)

    def ask(self, seen: Tensor) -> Tensor:
        """The Q-Former: its queries look at the image in every second layer."""
        bert = "Qformer.bert."
        x = self.norm(f"{bert}embeddings.LayerNorm", self.state["query_tokens"].expand(len(seen), -1, -1), 1e-12)
        for index in range(Q_LAYERS):
            layer = f"{bert}encoder.layer.{index}."
            for kind, told in (("attention", None), ("crossattention", seen)):
                if f"{layer}{kind}.self.query.weight" not in self.state:
                    continue
                source = x if told is None else told
                said = attention(
                    self.linear(f"{layer}{kind}.self.query", x),
                    self.linear(f"{layer}{kind}.self.key", source),
                    self.linear(f"{layer}{kind}.self.value", source),
                    Q_HEADS,
                )
                x = self.norm(
                    f"{layer}{kind}.output.LayerNorm", x + self.linear(f"{layer}{kind}.output.dense", said), 1e-12
                )
            inner = gelu(self.linear(f"{layer}intermediate_query.dense", x))
            x = self.norm(f"{layer}output_query.LayerNorm", x + self.linear(f"{layer}output_query.dense", inner), 1e-12)
        return x


def rotated(x: Tensor, heads: int, width: int) -> Tensor:
    """Rotary embedding of the first `width` channels of each head; pairs are (i, i + width / 2)."""
    x = x.unflatten(-1, (heads, -1))
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, two, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1).flatten(2)
