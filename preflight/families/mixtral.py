"""Mixtral: Mistral's attention, and several MLPs of which a router chooses two for each token."""

from preflight.families.parts import Experts, Mlp
from preflight.families.spec import Family

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    defaults={"num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8},
    mlp=Mlp("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    experts=Experts(count=("num_local_experts",)),
    renamed_in_blocks={
        "block_sparse_moe.": "mlp.",
        ".w1.": ".gate_proj.",
        ".w2.": ".down_proj.",
        ".w3.": ".up_proj.",
    },
)
