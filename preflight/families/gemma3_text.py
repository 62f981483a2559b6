"""Gemma 3, text models: Gemma 2 with queries and keys normalised per head, and other angles in windowed blocks."""

from preflight.families.gemma2 import FAMILY as GEMMA2
from preflight.families.spec import Family

FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    biases=GEMMA2.biases,
    defaults=GEMMA2.defaults,
    only=GEMMA2.only,
    norms=GEMMA2.norms,
    qk_norm=True,
    blocks_by_place=True,
    rotary_by_layer_type=True,
    attention_scale=GEMMA2.attention_scale,
    embedding_scale=GEMMA2.embedding_scale,
    logits_cap=GEMMA2.logits_cap,
    post_norms=GEMMA2.post_norms,
)
