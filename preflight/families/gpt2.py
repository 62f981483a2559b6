"""GPT-2: learned positions, linears stored transposed, query, key and value in one tensor."""

from preflight.families.parts import Attention, Fused, Mlp
from preflight.families.spec import Family

FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    biases={
        "attn.q_proj": True,
        "attn.k_proj": True,
        "attn.v_proj": True,
        "attn.c_proj": True,
        "mlp.c_fc": True,
        "mlp.c_proj": True,
    },
    keys={
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    defaults={"n_positions": 1024, "tie_word_embeddings": True},
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    blocks="transformer.h",
    embeddings="transformer.wte",
    final_norm="transformer.ln_f",
    attention=Attention("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.c_proj"),
    mlp=Mlp(gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    fused=(Fused("attn.c_attn", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),),
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    optional_prefix="transformer.",
    norms=("ln_1", "ln_2"),
    norm_bias=True,
    rotary="",
    positions="transformer.wpe",
    mlp_width_factor=4,
    grouped_query=False,
    head_dim_is_free=False,
)
