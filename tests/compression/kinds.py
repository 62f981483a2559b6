"""The contract's cases: all families; grouped, single and many key/value heads; with and without biases and ties."""

from typing import Any

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
Case = tuple[str, dict[str, Any]]

CASES: list[Case] = [
    ("llama", {"kv_heads": 2, "tied": True}),
    ("llama", {"kv_heads": 1, "bias": True}),
    ("llama", {"kv_heads": 4, "head_dim": 10, "hidden": 24, "intermediate": 37}),
    ("mistral", {"kv_heads": 2}),
    ("qwen2", {"kv_heads": 2}),
    ("qwen2", {"kv_heads": 1, "layers": 3}),
    ("qwen3", {"kv_heads": 2, "tied": True}),
    ("qwen3", {"kv_heads": 1, "bias": True, "head_dim": 10}),
    ("qwen3", {"kv_heads": 4}),
    ("granite", {"kv_heads": 2, "tied": True}),
    ("granite", {"kv_heads": 1, "bias": True, "mlp_bias": True}),
    ("granite", {"kv_heads": 4, "head_dim": 10}),
    ("smollm3", {"kv_heads": 2, "tied": True}),
    ("smollm3", {"kv_heads": 1, "bias": True, "mlp_bias": True, "layers": 3}),
    ("smollm3", {"kv_heads": 4, "head_dim": 10, "no_rope_layers": [0, 1]}),
    ("phi3", {"kv_heads": 2, "tied": True}),
    ("phi3", {"kv_heads": 1, "sliding_window": 7}),
    ("phi3", {"kv_heads": 4, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    ("phi3", {"kv_heads": 2, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}),
    ("phi", {"kv_heads": 4}),
    ("phi", {"kv_heads": 2, "head_dim": 12, "hidden": 48}),
    ("phi", {"kv_heads": 1, "tied": True}),
    ("phi", {"kv_heads": 2, "qk_layernorm": True}),
    ("opt", {"bias": True, "tied": True}),
    ("opt", {"heads": 2}),
    ("gpt2", {"tied": True}),
    ("gpt2", {"heads": 2, "intermediate": 37}),
    ("gpt_neox", {"heads": 2, "bias": True}),
    ("gpt_neox", {"heads": 4, "tied": True, "use_parallel_residual": False}),
    ("gemma2", {"kv_heads": 2, "tied": True}),
    ("gemma2", {"kv_heads": 1, "bias": True, "head_dim": 10}),
    ("gemma2", {"kv_heads": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"kv_heads": 2, "tied": True}),
    ("gemma3_text", {"kv_heads": 1, "bias": True, "head_dim": 10}),
    ("gemma3_text", {"kv_heads": 4, "final_logit_softcapping": 2.0}),
    ("mixtral", {"kv_heads": 2, "tied": True}),
    ("mixtral", {"kv_heads": 1, "sliding_window": 7}),
    ("mixtral", {"kv_heads": 4, "head_dim": 10}),
    ("qwen3_moe", {"kv_heads": 2, "tied": True}),
    ("qwen3_moe", {"kv_heads": 1, "bias": True, "norm_topk_prob": False}),
]
