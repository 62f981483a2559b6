"""The decoder inside Qwen2.5-VL: as that of Qwen2-VL."""

from preflight.families.qwen2 import FAMILY as QWEN2
from preflight.families.spec import Family

FAMILY = Family(
    name="qwen2_5_vl_text",
    architecture="Qwen2_5_VLTextModel",
    biases=QWEN2.biases,
    alone=False,
    head_dim_is_free=False,
)
