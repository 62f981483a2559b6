"""The decoder inside ArtGPT-4: LLaMA with a bottleneck on the stream between attention and MLP of each block."""

from dataclasses import replace

from preflight.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    name="artgpt4_llama",
    architecture="ArtGpt4LlamaModel",
    biases={**LLAMA.biases, "adapter.down": True, "adapter.up": True},
    between={"adapter.down": ("adapter_size", "hidden_size"), "adapter.up": ("hidden_size", "adapter_size")},
    alone=False,
)
