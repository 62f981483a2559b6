"""The decoder inside Qwen3-VL: Qwen3 with positions on three axes; images are also added after its first blocks."""

from preflight.families.qwen3 import FAMILY as QWEN3
from preflight.families.spec import Family

FAMILY = Family(
    name="qwen3_vl_text",
    architecture="Qwen3VLTextModel",
    biases=QWEN3.biases,
    defaults=QWEN3.defaults,
    qk_norm=True,
    alone=False,
    blocks_by_place=True,
    head_dim_is_free=False,
)
