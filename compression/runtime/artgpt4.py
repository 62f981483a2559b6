"""ArtGPT-4: MiniGPT-4's whole around a LLaMA with a small bottleneck of its own in every block.

    h = x + attention(n(x));   h = h + up(GELU(down(h)));   y = h + mlp(n'(h))

The bottleneck (the authors' ImageAdapter) reads and changes the stream itself, of text and image tokens alike.

Source: DLYuanGod/ArtGPT-4, `minigpt4/models/{mini_gpt4,modeling_llama}.py` (arXiv 2305.07490).
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from compression.runtime.minigpt4 import MiniGpt4Config, MiniGpt4ForConditionalGeneration, register_whole


class ArtGpt4LlamaConfig(LlamaConfig):
    """LLaMA's configuration with the width of the bottleneck."""

    model_type = "artgpt4_llama"
    adapter_size: int = 1280


class ImageAdapter(nn.Module):
    """x + up(GELU(down(x)))."""

    def __init__(self, width: int, bottleneck: int) -> None:
        """Make both linears, with biases."""
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape."""
        moved: Tensor = hidden + self.up(nn.functional.gelu(self.down(hidden)))
        return moved


class ArtGpt4DecoderLayer(LlamaDecoderLayer):
    """LLaMA's block with the bottleneck between attention and MLP."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        """Add the bottleneck."""
        super().__init__(config, layer_idx)
        self.adapter = ImageAdapter(config.hidden_size, config.adapter_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map `[batch, tokens, hidden]` to the same shape."""
        said, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        middle: Tensor = self.adapter(hidden_states + said)
        moved: Tensor = middle + self.mlp(self.post_attention_layernorm(middle))
        return moved


class ArtGpt4LlamaModel(LlamaModel):
    """The decoder without a head."""

    config_class = ArtGpt4LlamaConfig
    config: Any
    _no_split_modules = ("ArtGpt4DecoderLayer",)

    def __init__(self, config: Any) -> None:
        """Build LLaMA, then put these blocks in place of its own."""
        super().__init__(config)
        self.layers = nn.ModuleList(ArtGpt4DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class ArtGpt4LlamaForCausalLM(LlamaForCausalLM):
    """The decoder with its head."""

    config_class = ArtGpt4LlamaConfig
    config: Any
    _no_split_modules = ("ArtGpt4DecoderLayer",)

    def __init__(self, config: Any) -> None:
        """Build LLaMA, then put this decoder in place of its own."""
        super().__init__(config)
        self.model = ArtGpt4LlamaModel(config)
        self.post_init()


class ArtGpt4Config(MiniGpt4Config):
    """MiniGPT-4's configuration around this decoder."""

    model_type = "artgpt4"


class ArtGpt4ForConditionalGeneration(MiniGpt4ForConditionalGeneration):
    """The whole."""

    config_class = ArtGpt4Config
    config: Any


def register() -> None:
    """Make the Auto classes know ArtGPT-4 and its decoder; safe to call twice."""
    AutoConfig.register(ArtGpt4LlamaConfig.model_type, ArtGpt4LlamaConfig, exist_ok=True)
    AutoModel.register(ArtGpt4LlamaConfig, ArtGpt4LlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(ArtGpt4LlamaConfig, ArtGpt4LlamaForCausalLM, exist_ok=True)
    register_whole(ArtGpt4Config, ArtGpt4ForConditionalGeneration)
