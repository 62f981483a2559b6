"""What a family table says: names and facts, no code. Shapes follow from it and a model's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one model, in channels unless said otherwise."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    blocks: int
    vocabulary: int
    tied_head: bool

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Attention:
    """Names of a block's attention linears, relative to the block."""

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"


@dataclass(frozen=True)
class GatedMlp:
    """Names of a block's MLP linears, relative to the block: `down(act(gate(x)) * up(x))`."""

    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """One decoder architecture: where its parts are and what holds for them.

    `biases` maps a linear (relative to the block) to True, or to the configuration key that decides.
    """

    name: str
    architecture: str
    biases: Mapping[str, bool | str]
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    attention: Attention = Attention()
    mlp: GatedMlp = GatedMlp()
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_dim_is_free: bool = True  # stock code takes `head_dim` from the configuration for all four linears

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """Read the sizes; raises KeyError naming the configuration key that is missing."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Dimensions(
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            mlp_width=int(config["intermediate_size"]),
            blocks=int(config["num_hidden_layers"]),
            vocabulary=int(config["vocab_size"]),
            tied_head=bool(config.get("tie_word_embeddings", False)),
        )

    def has_bias(self, linear: str, config: Mapping[str, Any]) -> bool:
        """Whether a block's linear carries a bias under this configuration."""
        rule = self.biases.get(linear, False)
        return bool(config.get(rule, False)) if isinstance(rule, str) else rule

    def block_count(self, config: Mapping[str, Any]) -> int:
        """How many decoder blocks the configuration calls for."""
        return self.dimensions(config).blocks

    def block_prefix(self, index: int) -> str:
        """The tensor-name prefix of one decoder block, with its trailing dot."""
        return f"{self.blocks}.{index}."

    def required_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor the configuration calls for, with its shape; a tied head is not listed."""
        size = self.dimensions(config)
        tensors: dict[str, tuple[int, ...]] = {
            f"{self.embeddings}.weight": (size.vocabulary, size.hidden),
            f"{self.final_norm}.weight": (size.hidden,),
        }
        if not size.tied_head:
            tensors[f"{self.head}.weight"] = (size.vocabulary, size.hidden)
        block = self.block_tensors(config)
        for index in range(size.blocks):
            prefix = self.block_prefix(index)
            tensors.update({prefix + name: shape for name, shape in block.items()})
        return tensors

    def block_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of one block, relative to it, with their shapes `[out_features, in_features]`."""
        size = self.dimensions(config)
        linears = {
            self.attention.query: (size.heads * size.head_dim, size.hidden),
            self.attention.key: (size.kv_heads * size.head_dim, size.hidden),
            self.attention.value: (size.kv_heads * size.head_dim, size.hidden),
            self.attention.output: (size.hidden, size.heads * size.head_dim),
            self.mlp.gate: (size.mlp_width, size.hidden),
            self.mlp.up: (size.mlp_width, size.hidden),
            self.mlp.down: (size.hidden, size.mlp_width),
        }
        tensors: dict[str, tuple[int, ...]] = {f"{norm}.weight": (size.hidden,) for norm in self.norms}
        for linear, shape in linears.items():
            tensors[f"{linear}.weight"] = shape
            if self.has_bias(linear, config):
                tensors[f"{linear}.bias"] = (shape[0],)
        return tensors
