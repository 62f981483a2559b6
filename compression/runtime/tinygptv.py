"""TinyGPT-V: MiniGPT-4's whole around a Phi-2 with two kinds of norms more.

Queries and keys go through LayerNorms over their heads before rotation (stock Phi has these, switched off), and what
attention says goes through an RMSNorm on its way to the stream, which stock Phi does not have:

    y = x + RMSNorm(attention(n(x))) + mlp(n(x))

Source: DLYuanGod/TinyGPT-V, `modeling_phi.py` (arXiv 2312.16862); its loop that looks for NaN has no effect.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PhiConfig, PhiForCausalLM, PhiModel
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from compression.runtime.minigpt4 import MiniGpt4Config, MiniGpt4ForConditionalGeneration, register_whole


class TinyGptvPhiConfig(PhiConfig):
    """Phi's configuration with the epsilon of the norm after attention."""

    model_type = "tinygptv_phi"
    qk_layernorm: bool = True
    post_layernorm_eps: float = 1e-6


class TinyGptvPhiDecoderLayer(PhiDecoderLayer):
    """Phi's block whose attention speaks through an RMSNorm."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        """Add the norm."""
        super().__init__(config, layer_idx)
        self.post_layernorm = nn.RMSNorm(config.hidden_size, eps=config.post_layernorm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map `[batch, tokens, hidden]` to the same shape."""
        normed = self.input_layernorm(hidden_states)
        said, _ = self.self_attn(hidden_states=normed, **kwargs)
        moved: Tensor = hidden_states + self.post_layernorm(said) + self.mlp(normed)
        return moved


class TinyGptvPhiModel(PhiModel):
    """The decoder without a head."""

    config_class = TinyGptvPhiConfig
    config: Any
    _no_split_modules = ("TinyGptvPhiDecoderLayer",)

    def __init__(self, config: Any) -> None:
        """Build Phi, then put these blocks in place of its own."""
        super().__init__(config)
        self.layers = nn.ModuleList(TinyGptvPhiDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class TinyGptvPhiForCausalLM(PhiForCausalLM):
    """The decoder with its head, which has a bias."""

    config_class = TinyGptvPhiConfig
    config: Any
    _no_split_modules = ("TinyGptvPhiDecoderLayer",)

    def __init__(self, config: Any) -> None:
        """Build Phi, then put this decoder in place of its own."""
        super().__init__(config)
        self.model = TinyGptvPhiModel(config)
        self.post_init()


class TinyGptvConfig(MiniGpt4Config):
    """MiniGPT-4's configuration around this decoder."""

    model_type = "tinygptv"


class TinyGptvForConditionalGeneration(MiniGpt4ForConditionalGeneration):
    """The whole."""

    config_class = TinyGptvConfig
    config: Any


def register() -> None:
    """Make the Auto classes know TinyGPT-V and its decoder; safe to call twice."""
    AutoConfig.register(TinyGptvPhiConfig.model_type, TinyGptvPhiConfig, exist_ok=True)
    AutoModel.register(TinyGptvPhiConfig, TinyGptvPhiModel, exist_ok=True)
    AutoModelForCausalLM.register(TinyGptvPhiConfig, TinyGptvPhiForCausalLM, exist_ok=True)
    register_whole(TinyGptvConfig, TinyGptvForConditionalGeneration)
