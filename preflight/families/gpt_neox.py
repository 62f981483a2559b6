"""GPT-NeoX (Pythia, Dolly, …): each head's query, key and value rows together, part of each head rotated."""

from preflight.families.parts import Attention, Fused, Mlp
from preflight.families.spec import Family

FAMILY = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    biases={
        "attention.q_proj": "attention_bias",
        "attention.k_proj": "attention_bias",
        "attention.v_proj": "attention_bias",
        "attention.dense": "attention_bias",
        "mlp.dense_h_to_4h": True,
        "mlp.dense_4h_to_h": True,
    },
    defaults={"attention_bias": True, "use_parallel_residual": True},
    blocks="gpt_neox.layers",
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    attention=Attention("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.dense"),
    mlp=Mlp(gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    fused=(
        Fused("attention.query_key_value", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), by_head=True),
    ),
    renamed={"embed_out": "lm_head"},
    norm_bias=True,
    rotary="gpt_neox.rotary_emb",
    rotary_fraction=("rotary_pct", 0.25),
    grouped_query=False,
    head_dim_is_free=False,
    parallel="use_parallel_residual",
)
