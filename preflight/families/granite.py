"""Granite 3: Llama's parts with constant multipliers on embeddings, residual branches, attention and logits."""

from preflight.families.llama import FAMILY as LLAMA
from preflight.families.spec import Family

FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    biases=LLAMA.biases,
    defaults={
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    attention_scale=("attention_multiplier", 1.0),
    embedding_scale=("embedding_multiplier", 1.0),
    logits_scale=("logits_scaling", -1.0),
    residual_scale=("residual_multiplier", 1.0),
)
