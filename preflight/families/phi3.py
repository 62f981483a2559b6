"""Phi-3, Phi-3.5 and Phi-4 (mini): query, key and value in one tensor, gate and up in another."""

from preflight.families.parts import Fused
from preflight.families.spec import Family

FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    fused=(
        Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    rotary_fraction=("partial_rotary_factor", 1.0),
    head_dim_is_free=False,  # it reads head_dim, but takes longrope factors for hidden / heads channels only
)
