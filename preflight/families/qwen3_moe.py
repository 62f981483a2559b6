"""Qwen3 with experts in every block (30B-A3B, 235B-A22B, Coder): Qwen3's attention, a router over many small MLPs."""

from preflight.families.parts import Experts, Mlp
from preflight.families.qwen3 import FAMILY as QWEN3
from preflight.families.spec import Family

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    biases=QWEN3.biases,
    keys={"intermediate_size": "moe_intermediate_size"},
    defaults={"num_experts_per_tok": 8, "num_key_value_heads": 4, "moe_intermediate_size": 768},
    only={"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
    mlp=Mlp("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    experts=Experts(count=("num_experts", "num_local_experts")),
    qk_norm=True,
)
