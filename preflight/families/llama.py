"""Llama (and what is published in its form: SmolLM2, TinyLlama, Vicuna, …)."""

from preflight.families.spec import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    biases={
        "self_attn.q_proj": "attention_bias",
        "self_attn.k_proj": "attention_bias",
        "self_attn.v_proj": "attention_bias",
        "self_attn.o_proj": "attention_bias",
        "mlp.gate_proj": "mlp_bias",
        "mlp.up_proj": "mlp_bias",
        "mlp.down_proj": "mlp_bias",
    },
)
