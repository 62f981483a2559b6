"""What a family table says: names and facts, no code. Shapes follow from it and a model's configuration.

Names are *canonical*: every linear is one tensor `[out_features, in_features]`. Where a checkpoint stores several
linears as one tensor, or a linear transposed, the table says so and everything else sees the canonical form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from preflight.families.dimensions import Dimensions
from preflight.families.parts import USUAL_ATTENTION, USUAL_MLP, Attention, Experts, Fused, Mlp

Entry = TypeVar("Entry")
Shape = tuple[int, ...]
Power = tuple[str, float]  # a factor: the value of a configuration key, raised to a power


@dataclass(frozen=True)
class Family:
    """One decoder architecture: where its parts are and what holds for them.

    Attributes:
        biases: a linear (relative to the block) to True, or to the configuration key that decides.
        keys: our name of a configuration value to the family's, where it differs.
        defaults: what the stock class assumes where a configuration key is absent.
        only: configuration values that this table holds for; others are refused.
        fused: linears that share a stored tensor.
        transposed: stored tensors that are `[in_features, out_features]`.
        optional_prefix: a prefix that old checkpoints of the bare decoder leave out.
        renamed: modules by their name on disk, where the stock class has another; `renamed_in_blocks`: parts of the
            names of blocks' tensors, likewise.
        norms: norms over the hidden channels; `norm_bias` says whether norms have a bias, all but `plain_norms`.
        qk_norm: whether queries and keys are normalised per head, or the configuration key that decides.
        rotary: the module of rotary angles, empty where there are none; `rotary_by_layer_type` has two sets of angles.
        rotary_fraction: share of a head that is rotated, by configuration key and default; None rotates all of it.
        unrotated: configuration keys of blocks without rotary embedding: a flag per block, or an interval.
        positions: learned position embeddings, whose rows start at `position_offset`.
        attention_scale: of the attention logits; None is one over the root of the head size.
        attention_cap: configuration key of their cap `c tanh(logits / c)`; `logits_cap` is that of the head's logits.
        embedding_scale: of the embeddings; `logits_scale` is that of the head's logits.
        mlp_width_factor: the MLP's width in hidden sizes where the configuration does not say.
        parallel: both halves read the same stream, x + attention(norm(x)) + mlp(norm'(x)), or the configuration key
            that decides; else the MLP reads what attention left, h = x + attention(norm(x)), then h + mlp(norm'(h)).
        residual_scale: of what each half adds to the stream.
        post_norms: those of `norms` through which attention and MLP go on their way to the stream.
        between: linears between attention and MLP that change the stream itself, in forward order: the configuration
            keys of their outputs and inputs.
        blocks_by_place: stock code makes blocks of several kinds, by their number.
        alone: whether there are checkpoints of it alone; else it is only found inside a composite, and `architecture`
            has no head.
        head_dim_is_free: stock code takes `head_dim` from the configuration for all four linears.
    """

    name: str
    architecture: str
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    head_bias: bool = False
    attention: Attention = USUAL_ATTENTION
    mlp: Mlp = USUAL_MLP
    experts: Experts | None = None
    fused: tuple[Fused, ...] = ()
    transposed: frozenset[str] = frozenset()
    optional_prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    renamed_in_blocks: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    plain_norms: tuple[str, ...] = ()
    between: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    qk_norm: bool | str = False
    rotary: str = "model.rotary_emb"
    rotary_by_layer_type: bool = False
    rotary_fraction: Power | None = None
    unrotated: tuple[str, str] | None = None
    positions: str = ""
    position_offset: int = 0
    attention_scale: Power | None = None
    attention_cap: str = ""
    embedding_scale: Power | None = None
    logits_scale: Power | None = None
    logits_cap: str = ""
    mlp_width_factor: int = 0
    grouped_query: bool = True
    parallel: bool | str = False
    residual_scale: Power | None = None
    post_norms: tuple[str, ...] = ()
    alone: bool = True
    head_dim_is_free: bool = True
    blocks_by_place: bool = False

    @property
    def stored_canonically(self) -> bool:
        """Whether the stored tensors are the canonical ones."""
        return not self.fused and not self.transposed and self.experts is None

    def mlps(self, size: Dimensions) -> tuple[Mlp, ...]:
        """The names of the block's MLP, or of all its experts."""
        return (self.mlp,) if self.experts is None else tuple(map(self.mlp.numbered, range(size.experts)))

    @property
    def mlp_norm(self) -> str:
        """The norm that reads the stream for the MLP."""
        return next(norm for norm in reversed(self.norms) if norm not in self.post_norms)

    @property
    def mlp_entry(self) -> str:
        """The first linear to read what the MLP is given: its first input projection, or the router."""
        return self.mlp.inputs[0] if self.experts is None else self.experts.router

    @property
    def mlp_output(self) -> str:
        """The module that says what the MLP adds, before any norm or scale."""
        return self.mlp.down if self.experts is None else self.experts.module

    def is_parallel(self, config: Mapping[str, Any]) -> bool:
        """Whether attention and MLP read the same stream under this configuration."""
        return self._holds(self.parallel, config)

    def setting(self, config: Mapping[str, Any], name: str) -> Any:
        """A configuration value under the family's own key, or the stock class's default, or None."""
        key = self.keys.get(name, name)
        value = config.get(key)
        return self.defaults.get(key) if value is None else value

    def factor(self, config: Mapping[str, Any], rule: Power | None) -> float:
        """The factor that a rule makes of the configuration; 1 without a rule."""
        if rule is None:
            return 1.0
        return float(self._needed(config, rule[0]) ** rule[1])

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """Read the sizes; raises KeyError naming the configuration key that is missing."""
        hidden, heads = int(self._needed(config, "hidden_size")), int(self._needed(config, "num_attention_heads"))
        head_dim = int((self.grouped_query and self.setting(config, "head_dim")) or hidden // heads)
        width = self.setting(config, "intermediate_size") or self.mlp_width_factor * hidden
        flags, every = (self.setting(config, key) for key in self.unrotated) if self.unrotated else (None, 0)
        return Dimensions(
            hidden=hidden,
            heads=heads,
            kv_heads=int((self.grouped_query and self.setting(config, "num_key_value_heads")) or heads),
            head_dim=head_dim,
            mlp_width=int(width or self._needed(config, "intermediate_size")),
            blocks=int(self._needed(config, "num_hidden_layers")),
            vocabulary=int(self._needed(config, "vocab_size")),
            tied_head=bool(self.setting(config, "tie_word_embeddings")),
            rotary_width=self._rotary_width(config, head_dim),
            attention_scale=self.factor(config, self.attention_scale) if self.attention_scale else head_dim**-0.5,
            qk_norm=self.has_qk_norm(config),
            rotates=flags,
            unrotated_every=int(every or 0),
            experts=self._count_experts(config),
            routed=1 if self.experts is None else int(self._needed(config, self.experts.chosen)),
        )

    def _needed(self, config: Mapping[str, Any], name: str) -> Any:
        value = self.setting(config, name)
        if value is None:
            raise KeyError(self.keys.get(name, name))
        return value

    def _count_experts(self, config: Mapping[str, Any]) -> int:
        if self.experts is None:
            return 1
        counts = [self.setting(config, key) for key in self.experts.count]
        return int(next((count for count in counts if count is not None), 0))

    def _rotary_width(self, config: Mapping[str, Any], head_dim: int) -> int:
        if not self.rotary:
            return 0
        if self.rotary_fraction is None:
            return head_dim
        key, default = self.rotary_fraction
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        fraction = scaling.get("partial_rotary_factor", config.get(key))
        return int(head_dim * (default if fraction is None else fraction))

    def has_bias(self, linear: str, config: Mapping[str, Any]) -> bool:
        """Whether a block's linear carries a bias under this configuration."""
        return self._holds(self.biases.get(linear, False), config)

    def has_qk_norm(self, config: Mapping[str, Any]) -> bool:
        """Whether queries and keys are normalised per head, which ties all their channels together."""
        return self._holds(self.qk_norm, config)

    def _holds(self, rule: bool | str, config: Mapping[str, Any]) -> bool:
        return bool(self.setting(config, rule)) if isinstance(rule, str) else rule

    def full_names(self, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
        """The tensors under this table's names, however the checkpoint calls them."""
        prefix = self.optional_prefix
        bare = bool(prefix) and not any(name.startswith(prefix) for name in tensors)
        named = {}
        for name, entry in tensors.items():
            module, _, kind = name.rpartition(".")
            full = f"{self.renamed[module]}.{kind}" if module in self.renamed else name
            named[prefix + full if bare and not full.startswith(f"{self.head}.") else full] = entry
        return named

    def stored_name(self, tensor: str) -> str:
        """What the stock class calls a tensor on disk."""
        module, _, kind = tensor.rpartition(".")
        return next((f"{stored}.{kind}" for stored, ours in self.renamed.items() if ours == module), tensor)

    def block_count(self, config: Mapping[str, Any]) -> int:
        """How many decoder blocks the configuration calls for."""
        return self.dimensions(config).blocks

    def block_prefix(self, index: int) -> str:
        """The tensor-name prefix of one decoder block, with its trailing dot."""
        return f"{self.blocks}.{index}."

    def required_tensors(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Every stored tensor the configuration calls for, with its shape; a tied head is not listed."""
        size = self.dimensions(config)
        tensors: dict[str, Shape] = {f"{self.embeddings}.weight": (size.vocabulary, size.hidden)}
        tensors.update(self._norm(self.final_norm, size.hidden))
        if self.positions:
            rows = int(self._needed(config, "max_position_embeddings")) + self.position_offset
            tensors[f"{self.positions}.weight"] = (rows, size.hidden)
        if not size.tied_head:
            tensors[f"{self.head}.weight"] = (size.vocabulary, size.hidden)
        if self.head_bias:
            tensors[f"{self.head}.bias"] = (size.vocabulary,)
        block = self.block_tensors(config)
        for index in range(size.blocks):
            prefix = self.block_prefix(index)
            tensors.update({prefix + name: shape for name, shape in block.items()})
        return tensors

    def block_tensors(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """The stored tensors of one block, relative to it, with their shapes."""
        tensors = self.canonical_tensors(config)
        for fused in self.fused:
            for kind in ("weight", "bias"):
                shapes = [tensors.pop(name) for part in fused.parts if (name := f"{part}.{kind}") in tensors]
                if shapes:
                    tensors[f"{fused.stored}.{kind}"] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        for stored in self.transposed:
            tensors[f"{stored}.weight"] = tensors[f"{stored}.weight"][::-1]
        return {self.stored_block_name(name): shape for name, shape in tensors.items()}

    def stored_block_name(self, tensor: str) -> str:
        """What a block's tensor is called on disk."""
        for stored, ours in self.renamed_in_blocks.items():
            tensor = tensor.replace(ours, stored)
        return tensor

    def canonical_block_name(self, tensor: str) -> str:
        """What a block's stored tensor is called here."""
        for stored, ours in self.renamed_in_blocks.items():
            tensor = tensor.replace(stored, ours)
        return tensor

    def canonical_tensors(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """The canonical tensors of one block, relative to it, with their shapes `[out_features, in_features]`."""
        size = self.dimensions(config)
        linears = {
            self.attention.query: (size.heads * size.head_dim, size.hidden),
            self.attention.key: (size.kv_heads * size.head_dim, size.hidden),
            self.attention.value: (size.kv_heads * size.head_dim, size.hidden),
            self.attention.output: (size.hidden, size.heads * size.head_dim),
        }
        for mlp in self.mlps(size):
            linears.update({linear: (size.mlp_width, size.hidden) for linear in mlp.inputs})
            linears[mlp.down] = (size.hidden, size.mlp_width)
        if self.experts is not None:
            linears[self.experts.router] = (size.experts, size.hidden)
        linears.update(self.between_shapes(config))
        tensors: dict[str, Shape] = {}
        for norm in self.norms:
            tensors.update(self._norm(norm, size.hidden))
        if self.has_qk_norm(config):
            for norm in (self.attention.query_norm, self.attention.key_norm):
                tensors.update(self._norm(norm, size.head_dim))
        for linear, shape in linears.items():
            tensors[f"{linear}.weight"] = shape
            if self.has_bias(linear, config):
                tensors[f"{linear}.bias"] = (shape[0],)
        return tensors

    def between_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """`[out_features, in_features]` of the linears between attention and MLP."""
        return {
            linear: (int(self._needed(config, outputs)), int(self._needed(config, inputs)))
            for linear, (outputs, inputs) in self.between.items()
        }

    def _norm(self, norm: str, channels: int) -> dict[str, Shape]:
        kinds = ("weight", "bias") if self.norm_bias and norm not in self.plain_norms else ("weight",)
        return {f"{norm}.{kind}": (channels,) for kind in kinds}
