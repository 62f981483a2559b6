"""Recipes small enough for a model of two blocks."""

from typing import Any

SMALL_TEXT = {"source": "builtin", "sequence_length": 64}


def small_recipe(**changes: Any) -> dict[str, Any]:
    """A whole job in seconds."""
    return {
        "steps": [{"method": "modegpt", "sparsity": 0.2, "layout": "portable", "round_to": 4}],
        "calibration": {**SMALL_TEXT, "num_samples": 4},
        "evaluation": {**SMALL_TEXT, "num_windows": 2, "generation_tokens": 4},
        **changes,
    }
