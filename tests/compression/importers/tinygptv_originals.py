"""TinyGPT-V's files as its authors ship them, at tiny sizes, and its forward pass in plain torch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from tests.image_chat_originals import (
    HIDDEN,
    IMAGE,
    Q_HEADS,
    Q_WIDTH,
    VIT_HEADS,
    Maker,
    Originals,
    Run,
    State,
    attention,
    make_blip2,
    make_q_former,
    make_vit,
    rotated,
    save_delta,
    write_language,
)

BLOCKS, HEADS, MLP, VOCABULARY, MIDDLE, RANK = 2, 4, 96, 400, 40, 4
HEAD_DIM = HIDDEN // HEADS
ROTARY, ALPHA = HEAD_DIM // 2, 16.0
CONFIG: dict[str, Any] = {
    "model_type": "phi",
    "num_attention_heads": HEADS,
    "hidden_size": HIDDEN,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"},
}


def make_phi(make: Maker) -> State:
    """The fused copy of Phi-2, without the norms that the delta brings."""
    state = make.linear("lm_head", HIDDEN, VOCABULARY) | make.norm("model.final_layernorm", HIDDEN)
    state["model.embed_tokens.weight"] = make.normal(VOCABULARY, HIDDEN, scale=0.5)
    state["lm_head.weight"] *= 4  # so that the likeliest token stands out
    for index in range(BLOCKS):
        block = f"model.layers.{index}."
        state |= make.linear(f"{block}self_attn.query_key_value", HIDDEN, 3 * HIDDEN)
        state |= make.linear(f"{block}self_attn.dense", HIDDEN, HIDDEN) | make.norm(f"{block}input_layernorm", HIDDEN)
        state |= make.linear(f"{block}mlp.fc1", HIDDEN, MLP) | make.linear(f"{block}mlp.fc2", MLP, HIDDEN)
        state[f"{block}self_attn.rotary_emb.inv_freq"] = torch.ones(ROTARY // 2)
    return state


def in_layout(state: State, layout: str) -> State:
    """The same Phi as another release names and orders it."""
    if layout == "fused":
        return state
    made: State = {}
    for name, tensor in state.items():
        if "query_key_value" not in name:
            made[name] = tensor
            continue
        parts = tensor.unflatten(0, (HEADS, 3, HEAD_DIM)).unbind(1)
        if layout == "split":
            for letter, part in zip("qkv", parts, strict=True):
                made[name.replace("query_key_value", f"{letter}_proj")] = part.flatten(0, 1)
        else:
            made[name] = torch.cat([part.flatten(0, 1) for part in parts])
    if layout == "split":
        return made
    words = {
        "model.embed_tokens": "transformer.embd.wte",
        "model.final_layernorm": "lm_head.ln",
        "model.layers": "transformer.h",
        "self_attn.query_key_value": "mixer.Wqkv",
        "self_attn.dense": "mixer.out_proj",
        "self_attn.rotary_emb": "mixer.rotary_emb",
        "input_layernorm": "ln",
    }
    renamed: State = {}
    for name, tensor in made.items():
        new = name.replace("lm_head.", "lm_head.linear.")
        for ours, theirs in words.items():
            new = new.replace(ours, theirs)
        renamed[new] = tensor
    return renamed


def make_delta(make: Maker, stage: int, *, final_norm: bool = True) -> State:
    """Plain names: norms and projections, from stage 2 on adapters. The norms after heads have no trained bias."""
    state = make.linear("llama_proj", Q_WIDTH, MIDDLE) | make.linear("llama_proj2", MIDDLE, HIDDEN)
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    for index in range(BLOCKS):
        block = f"llama_model.model.layers.{index}."
        for name, width in (("self_attn.q_layernorm", HEAD_DIM), ("self_attn.k_layernorm", HEAD_DIM),
                            ("input_layernorm", HIDDEN), ("post_layernorm", HIDDEN)):  # fmt: skip
            state |= make.norm(block + name, width, bias=False)
        for module, outputs in (("query_key_value", 3 * HIDDEN), ("dense", HIDDEN)) if stage > 1 else ():
            state[f"{block}self_attn.{module}.lora_A.weight"] = make.normal(RANK, HIDDEN)
            state[f"{block}self_attn.{module}.lora_B.weight"] = make.normal(outputs, RANK)
    if final_norm:
        state |= make.norm("llama_model.model.final_layernorm", HIDDEN, bias=False)
    return state


def spelled(delta: State, stage: int, peft: str) -> State:
    """The delta's names as a version of peft writes them; stage 1 has no wrapper."""
    made: State = {}
    for name, tensor in delta.items():
        new = name.replace("llama_model.", "llama_model.base_model.model.") if stage > 1 else name
        if peft != "0.2":
            new = new.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        made[new] = tensor
    return made


def write_originals(
    folder: Path, *, stage: int = 3, layout: str = "fused", peft: str = "0.2", own_q_former: bool = False,
    final_norm: bool = True, seed: int = 0,
) -> Originals:  # fmt: skip
    """Write the four files; what comes back holds what the authors' program would."""
    make = Maker(seed)
    vision, blip2, phi = make_vit(make), make_blip2(make), make_phi(make)
    delta = make_delta(make, stage, final_norm=final_norm)
    if own_q_former:
        delta |= make_q_former(make)
    paths = {
        "language": folder / "phi-2",
        "vision": folder / "eva_vit_g.pth",
        "q_former": folder / "blip2_pretrained_flant5xxl.pth",
        "delta": folder / f"TinyGPT-V_for_Stage{stage}.pth",
    }
    write_language(paths["language"], json.dumps(CONFIG), in_layout(phi, layout))
    torch.save(vision, paths["vision"])
    torch.save({"model": blip2}, paths["q_former"])
    save_delta(paths["delta"], spelled(delta, stage, peft))
    state = {**vision, **blip2, **{f"llama_model.{name}": tensor for name, tensor in phi.items()}, **delta}
    options = {"vision_heads": VIT_HEADS, "q_former_heads": Q_HEADS, "image_size": IMAGE}
    return Originals(paths, state, options)


class TinyGptv(Run):
    """The authors' forward pass, adapters unmerged, projections apart."""

    def adapted(self, name: str, x: Tensor) -> Tensor:
        said = self.linear(name, x)
        first = self.state.get(f"{name}.lora_A.weight")
        if first is not None:
            said = said + ALPHA / RANK * linear(linear(x, first), self.state[f"{name}.lora_B.weight"])
        return said

    def per_head(self, name: str, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (HEADS, -1))
        weight = self.state[f"{name}.weight"]
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return ((x - mean) / (spread + 1e-5).sqrt() * weight).flatten(-2)

    def block(self, x: Tensor, index: int) -> Tensor:
        block = f"llama_model.model.layers.{index}."
        normed = self.norm(f"{block}input_layernorm", x, 1e-5)
        fused = self.adapted(f"{block}self_attn.query_key_value", normed).unflatten(-1, (HEADS, 3, HEAD_DIM))
        query, key, value = (part.flatten(-2) for part in fused.unbind(-2))
        query = rotated(self.per_head(f"{block}self_attn.q_layernorm", query), HEADS, ROTARY)
        key = rotated(self.per_head(f"{block}self_attn.k_layernorm", key), HEADS, ROTARY)
        said = self.adapted(f"{block}self_attn.dense", attention(query, key, value, HEADS, causal=True))
        said = (
            said * (said.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.state[f"{block}post_layernorm.weight"]
        )
        inner = gelu(self.linear(f"{block}mlp.fc1", normed), approximate="tanh")
        return x + said + self.linear(f"{block}mlp.fc2", inner)

    def pictures(self, pixels: Tensor) -> Tensor:
        return self.linear("llama_proj2", self.linear("llama_proj", self.ask(self.see(pixels))))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.state["llama_model.model.embed_tokens.weight"][tokens]

    def hidden(self, x: Tensor) -> Tensor:
        for index in range(BLOCKS):
            x = self.block(x, index)
        return self.norm("llama_model.model.final_layernorm", x, 1e-5)

    def logits(self, before: Tensor, pixels: Tensor, after: Tensor) -> Tensor:
        """Token ids `[tokens]` before and after one picture to logits `[tokens + queries + tokens, vocabulary]`."""
        x = torch.cat([self.embed(before)[None], self.pictures(pixels), self.embed(after)[None]], dim=1)
        return self.linear("llama_model.lm_head", self.hidden(x))[0]
