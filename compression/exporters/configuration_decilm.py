"""Configuration of a Llama whose blocks have MLPs of different widths, for vLLM's own class DeciLM.

It changes nothing but the form of `block_configs`: vLLM reads its entries as objects, JSON has them as dictionaries.
Written by Modepress beside the weights; it needs transformers and nothing else.
"""

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """Llama's configuration with `block_configs`, one entry per block."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, dict[str, Any]]] | None = None, **settings: Any) -> None:
        """Take Llama's settings, and the list of blocks as it stands in config.json."""
        super().__init__(**settings)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**said) for part, said in block.items()})
            for block in block_configs or ()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON has them."""
        settings: dict[str, Any] = super().to_dict()
        settings["block_configs"] = [
            {part: vars(said) for part, said in vars(block).items()} for block in self.block_configs
        ]
        return settings
