"""The contract's cases: in every family grouped, single and many key/value heads, biases on and off, tied and untied."""

from typing import Any

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
]
