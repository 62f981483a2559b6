"""OPT: learned positions and no rotary embedding, a ReLU MLP, LayerNorm, biases. Not the 350M variant."""

from preflight.families.parts import Attention, Mlp
from preflight.families.spec import Family

FAMILY = Family(
    name="opt",
    architecture="OPTForCausalLM",
    biases={
        "self_attn.q_proj": "enable_bias",
        "self_attn.k_proj": "enable_bias",
        "self_attn.v_proj": "enable_bias",
        "self_attn.out_proj": "enable_bias",
        "fc1": "enable_bias",
        "fc2": "enable_bias",
    },
    keys={"intermediate_size": "ffn_dim"},
    defaults={"enable_bias": True, "tie_word_embeddings": True},
    only={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    blocks="model.decoder.layers",
    embeddings="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    attention=Attention(output="self_attn.out_proj"),
    mlp=Mlp(gate=None, up="fc1", down="fc2"),
    optional_prefix="model.",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    norm_bias=True,
    rotary="",
    positions="model.decoder.embed_positions",
    position_offset=2,
    grouped_query=False,
    head_dim_is_free=False,
)
