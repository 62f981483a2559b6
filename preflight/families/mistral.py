"""Mistral: Llama's parts without biases, some releases with a sliding window."""

from preflight.families.spec import Family

FAMILY = Family(name="mistral", architecture="MistralForCausalLM", biases={})
