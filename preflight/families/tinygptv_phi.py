"""The decoder inside TinyGPT-V: Phi with norms over queries and keys, and one through which attention speaks."""

from dataclasses import replace

from preflight.families.phi import FAMILY as PHI

FAMILY = replace(
    PHI,
    name="tinygptv_phi",
    architecture="TinyGptvPhiModel",
    norms=("input_layernorm", "post_layernorm"),
    post_norms=("post_layernorm",),
    plain_norms=("post_layernorm",),
    qk_norm=True,
    alone=False,
)
