"""Gemma 2: norms before and after each half, embeddings times √hidden, capped logits, every second block windowed."""

from preflight.families.spec import Family

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    biases={
        "self_attn.q_proj": "attention_bias",
        "self_attn.k_proj": "attention_bias",
        "self_attn.v_proj": "attention_bias",
        "self_attn.o_proj": "attention_bias",
    },
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    blocks_by_place=True,
    only={"use_bidirectional_attention": (None, False)},
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    attention_scale=("query_pre_attn_scalar", -0.5),
    embedding_scale=("hidden_size", 0.5),
    attention_cap="attn_logit_softcapping",
    logits_cap="final_logit_softcapping",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
