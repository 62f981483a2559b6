"""The decoder inside Qwen2-VL: Qwen2 whose rotary positions have three axes, of which text uses one."""

from preflight.families.qwen2 import FAMILY as QWEN2
from preflight.families.spec import Family

FAMILY = Family(
    name="qwen2_vl_text",
    architecture="Qwen2VLTextModel",
    biases=QWEN2.biases,
    alone=False,
    head_dim_is_free=False,
)
