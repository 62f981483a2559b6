"""Phi-1, 1.5 and 2: attention and MLP side by side on one LayerNorm, part of each head rotated, biases all over."""

from preflight.families.parts import Attention, Mlp
from preflight.families.spec import Family

FAMILY = Family(
    name="phi",
    architecture="PhiForCausalLM",
    biases={
        "self_attn.q_proj": True,
        "self_attn.k_proj": True,
        "self_attn.v_proj": True,
        "self_attn.dense": True,
        "mlp.fc1": True,
        "mlp.fc2": True,
    },
    final_norm="model.final_layernorm",
    head_bias=True,
    attention=Attention(output="self_attn.dense", query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm"),
    mlp=Mlp(gate=None, up="mlp.fc1", down="mlp.fc2"),
    norms=("input_layernorm",),
    norm_bias=True,
    qk_norm="qk_layernorm",
    rotary_fraction=("partial_rotary_factor", 0.5),
    parallel=True,
)
