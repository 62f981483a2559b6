"""Qwen3: Llama's parts with queries and keys normalised per head."""

from preflight.families.spec import Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    biases={
        "self_attn.q_proj": "attention_bias",
        "self_attn.k_proj": "attention_bias",
        "self_attn.v_proj": "attention_bias",
        "self_attn.o_proj": "attention_bias",
    },
    defaults={"head_dim": 128},
    qk_norm=True,
)
