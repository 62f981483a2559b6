"""Qwen2 and Qwen2.5: biases on query, key and value, none on output."""

from preflight.families.spec import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    biases={"self_attn.q_proj": True, "self_attn.k_proj": True, "self_attn.v_proj": True},
)
