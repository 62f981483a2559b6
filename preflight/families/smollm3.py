"""SmolLM3: Llama's parts; every fourth block has no rotary embedding."""

from preflight.families.llama import FAMILY as LLAMA
from preflight.families.spec import Family

FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    biases=LLAMA.biases,
    defaults={"no_rope_layer_interval": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    blocks_by_place=True,
    unrotated=("no_rope_layers", "no_rope_layer_interval"),
)
