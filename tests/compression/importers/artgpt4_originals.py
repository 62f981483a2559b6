"""MiniGPT-4's and ArtGPT-4's files as their authors ship them, at tiny sizes, and their forward pass in plain torch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from tests.image_chat_originals import (
    HIDDEN,
    IMAGE,
    Q_HEADS,
    Q_WIDTH,
    VIT_HEADS,
    WIDTH,
    Maker,
    Originals,
    Run,
    State,
    attention,
    make_blip2,
    make_vit,
    rotated,
    save_delta,
    write_language,
)

BLOCKS, HEADS, MLP, VOCABULARY, BOTTLENECK, RANK, ALPHA, JOINED = 2, 4, 96, 400, 16, 4, 16.0, 4
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_sequence_length": 512,
}


def make_vicuna(make: Maker) -> State:
    """A merged Vicuna with the buffers of its time."""
    state = make.linear("lm_head", HIDDEN, VOCABULARY, bias=False) | make.norm("model.norm", HIDDEN, bias=False)
    state["model.embed_tokens.weight"] = make.normal(VOCABULARY, HIDDEN, scale=0.5)
    state["lm_head.weight"] *= 4
    for index in range(BLOCKS):
        block = f"model.layers.{index}."
        for letter in "qkvo":
            state |= make.linear(f"{block}self_attn.{letter}_proj", HIDDEN, HIDDEN, bias=False)
        for name in ("gate", "up"):
            state |= make.linear(f"{block}mlp.{name}_proj", HIDDEN, MLP, bias=False)
        state |= make.linear(f"{block}mlp.down_proj", MLP, HIDDEN, bias=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state |= make.norm(block + norm, HIDDEN, bias=False)
        state[f"{block}self_attn.rotary_emb.inv_freq"] = torch.ones(HIDDEN // HEADS // 2)
    return state


def make_art_delta(make: Maker, norms: str) -> State:
    """Bottlenecks in every block, and norms: `code`, as the authors' program trains, or `post`, as their file has."""
    state = make.linear("llama_proj", Q_WIDTH, HIDDEN)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    for index in range(BLOCKS):
        block = f"llama_model.model.layers.{index}."
        state |= make.linear(f"{block}self_attn.1.down", HIDDEN, BOTTLENECK)
        state |= make.linear(f"{block}self_attn.1.up", BOTTLENECK, HIDDEN)
        state |= make.norm(f"{block}post_attention_layernorm", HIDDEN, bias=False)
        if norms == "code" and index % 2 == 0:
            state |= make.norm(f"{block}input_layernorm", HIDDEN, bias=False)
        state[f"{block}self_attn.0.rotary_emb.inv_freq"] = torch.ones(HIDDEN // HEADS // 2)
    return state


def make_mini_delta(make: Maker, variant: str) -> State:
    """`q_former`: the projection alone; `joined`: of four patches; `v2`: with adapters of queries and values too."""
    state = make.linear("llama_proj", Q_WIDTH if variant == "q_former" else JOINED * WIDTH, HIDDEN)
    if variant == "q_former":
        state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    for index in range(BLOCKS) if variant == "v2" else ():
        for letter in "qv":
            module = f"llama_model.base_model.model.model.layers.{index}.self_attn.{letter}_proj"
            state[f"{module}.lora_A.weight"] = make.normal(RANK, HIDDEN)
            state[f"{module}.lora_B.weight"] = make.normal(HIDDEN, RANK)
    return state


def write_originals(folder: Path, form: str, seed: int = 0) -> Originals:
    """Write the files of `artgpt4-code`, `artgpt4-post`, `minigpt4-q_former`, `minigpt4-joined` or `minigpt4-v2`."""
    family, _, variant = form.partition("-")
    make = Maker(seed)
    vision, blip2, vicuna = make_vit(make), make_blip2(make), make_vicuna(make)
    delta = make_art_delta(make, variant) if family == "artgpt4" else make_mini_delta(make, variant)
    paths = {
        "language": folder / "vicuna",
        "vision": folder / "eva_vit_g.pth",
        "delta": folder / f"{family}.pth",
    }
    if variant not in ("joined", "v2"):
        paths["q_former"] = folder / "blip2_pretrained_flant5xxl.pth"
        torch.save({"model": blip2}, paths["q_former"])
    else:
        blip2 = {"ln_vision.weight": torch.ones(WIDTH), "ln_vision.bias": torch.zeros(WIDTH)}
    write_language(paths["language"], json.dumps(CONFIG), vicuna)
    torch.save(vision, paths["vision"])
    save_delta(paths["delta"], delta)
    plain = {name.replace("base_model.model.", ""): tensor for name, tensor in delta.items()}
    state = {**vision, **blip2, **{f"llama_model.{name}": tensor for name, tensor in vicuna.items()}, **plain}
    return Originals(paths, state, {"vision_heads": VIT_HEADS, "q_former_heads": Q_HEADS, "image_size": IMAGE})


class ImageChat(Run):
    """The authors' forward pass; blocks have a bottleneck where the state has one."""

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.state[f"{name}.weight"]

    def adapted(self, name: str, x: Tensor) -> Tensor:
        said, first = self.linear(name, x), self.state.get(f"{name}.lora_A.weight")
        if first is None:
            return said
        return said + ALPHA / RANK * linear(linear(x, first), self.state[f"{name}.lora_B.weight"])

    def block(self, x: Tensor, index: int) -> Tensor:
        block = f"llama_model.model.layers.{index}."
        normed = self.rms(f"{block}input_layernorm", x)
        query, key, value = (self.adapted(f"{block}self_attn.{letter}_proj", normed) for letter in "qkv")
        query, key = (rotated(tensor, HEADS, HIDDEN // HEADS) for tensor in (query, key))
        x = x + self.linear(f"{block}self_attn.o_proj", attention(query, key, value, HEADS, causal=True))
        if f"{block}self_attn.1.down.weight" in self.state:
            x = x + self.linear(f"{block}self_attn.1.up", gelu(self.linear(f"{block}self_attn.1.down", x)))
        normed = self.rms(f"{block}post_attention_layernorm", x)
        gate = silu(self.linear(f"{block}mlp.gate_proj", normed))
        return x + self.linear(f"{block}mlp.down_proj", gate * self.linear(f"{block}mlp.up_proj", normed))

    def pictures(self, pixels: Tensor) -> Tensor:
        seen = self.see(pixels)
        if "query_tokens" in self.state:
            return self.linear("llama_proj", self.ask(seen))
        patches = seen[:, 1:]
        return self.linear("llama_proj", patches.reshape(len(patches), patches.shape[1] // JOINED, JOINED * WIDTH))

    def logits(self, before: Tensor, pixels: Tensor, after: Tensor) -> Tensor:
        """Token ids `[tokens]` before and after one picture to logits `[all, vocabulary]`."""
        embeddings = self.state["llama_model.model.embed_tokens.weight"]
        x = torch.cat([embeddings[before][None], self.pictures(pixels), embeddings[after][None]], dim=1)
        for index in range(BLOCKS):
            x = self.block(x, index)
        return self.linear("llama_model.lm_head", self.rms("llama_model.model.norm", x))[0]
