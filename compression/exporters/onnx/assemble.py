"""The whole graph from its parts: each kind of block is traced once, every block's weights are read when written.

    input_ids [batch, tokens], past_key_values.N.key and .value [batch, heads, past, channels]
    → logits [batch, kept, vocabulary], present.N.key and .value [batch, heads, past + tokens, channels]

The names are those of optimum's exports. One more input, `first_logit` [1], may be left out: from which token on logits
are computed, −1 being the last alone. Texts of a batch have one length: there is no padding and so no mask among the
inputs.
"""

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compression.core.streamed_model import StreamedModel
from compression.exporters.onnx.codes import FLOAT32, Coding, embedding, lazy, product, shape_of
from compression.exporters.onnx.parts import BlockPart, FrontPart, NormPart, grouped
from compression.exporters.onnx.trace import GraphBuilder, Part, trace
from compression.runtime.onnx_session import FIRST_LOGIT, IDS, LOGITS, past_names, present_names

BATCH, TOKENS, PAST = 2, 4, 3  # of the examples; none is 0 or 1, which tracing would take for constants
IR_VERSION = 10
TO_THE_END = 2**63 - 1


class Assembly:
    """Builds graphs of one model; what is traced is traced once for all of them."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self.codings: Mapping[str, Coding] = {}
        self.family, self.size = model.family, model.size
        self.config = model.config.to_dict()
        self._block = lru_cache(maxsize=1)(self._read_block)
        self._traced: dict[Any, Part] = {}

    def build(self, codings: Mapping[str, Coding]) -> ir.Model:
        """A graph, whose tensors are read when it is written.

        Args:
            codings: how linears are held, by their full canonical names; the embedding under its own name. Those that
                are not named are float32.
        """
        self.codings = codings
        shapes = [self._cache_shapes(index) for index in range(self.model.blocks)]
        ids = ir.val(IDS, dtype=ir.DataType.INT64, shape=["batch", "tokens"])
        past = [
            ir.val(name, dtype=ir.DataType.FLOAT, shape=["batch", self.size.kv_heads, "past", rank])
            for name, rank in zip(past_names(len(shapes)), (rank for pair in shapes for rank in pair), strict=True)
        ]
        builder = GraphBuilder([ids, *past])
        hidden, windows, angles = self._front(builder, ids, past[0])
        present: list[ir.Value] = []
        for index in range(self.model.blocks):
            mask = windows[self._window(index)]
            own = angles.get(self._layer_type(index) if self.family.rotary_by_layer_type else None, ())
            hidden, *added = self._add_block(builder, index, hidden, mask, own, past[2 * index : 2 * index + 2])
            present += added
        outputs = [self._head(builder, hidden), *present]
        names = (LOGITS, *present_names(len(shapes)))
        kinds = ["kept", *["total"] * len(present)]
        for value, name, kind in zip(outputs, names, kinds, strict=True):
            value.name, value.dtype = name, ir.DataType.FLOAT
            last = self.size.vocabulary if kind == "kept" else None
            value.shape = ir.Shape(["batch", kind, last]) if last else None
        for value, rank in zip(present, (rank for pair in shapes for rank in pair), strict=True):
            value.shape = ir.Shape(["batch", self.size.kv_heads, "total", rank])
        builder.graph.outputs.extend(outputs)
        return ir.Model(builder.graph, ir_version=IR_VERSION, producer_name="modepress")

    def _read_block(self, index: int) -> nn.Module:
        return self.model.block(index, self.model.block_state(index))

    def _weight(self, index: int, name: str) -> Tensor:
        return self._block(index).state_dict()[name]

    def _cache_shapes(self, index: int) -> tuple[int, int]:
        """Channels of a head's keys and values."""
        attention = self.family.attention
        state = self._block(index).state_dict()
        rows = (state[f"{name}.weight"].shape[0] for name in (attention.key, attention.value))
        key, value = (count // self.size.kv_heads for count in rows)
        return key, value

    def _layer_type(self, index: int) -> str | None:
        kinds = getattr(self.model.config, "layer_types", None)
        return None if kinds is None else kinds[index]

    def _window(self, index: int) -> int | None:
        """Tokens that a block sees back, None where it sees all."""
        window = getattr(self.model.config, "sliding_window", None)
        return window if self._layer_type(index) in (None, "sliding_attention") else None

    def _front(
        self, builder: GraphBuilder, ids: ir.Value, past_key: ir.Value
    ) -> tuple[ir.Value, dict[int | None, ir.Value], dict[str | None, tuple[ir.Value, ...]]]:
        """Embedding, masks by window, and angles by layer type."""
        name = self.family.embeddings
        shape = self.model.tensors[f"{name}.weight"].shape
        coding = self.codings.get(name, FLOAT32)
        hidden = embedding(builder, ids, "embedded", name, shape, lambda: self._read(f"{name}.weight"), coding)
        if self.family.embedding_scale is not None:
            factor = torch.tensor(self.family.factor(self.config, self.family.embedding_scale))
            stored = self.model.read(f"{name}.weight").dtype  # stock code rounds the factor to it
            hidden = builder.node("Mul", [hidden, _number(builder, "embedding_factor", factor.to(stored))], "scaled")
        windows = tuple({self._window(index): None for index in range(self.model.blocks)})
        kinds: tuple[str | None, ...] = (None,)
        if self.family.rotary_by_layer_type:
            kinds = tuple({self._layer_type(index): None for index in range(self.model.blocks)})
        traced = self._once("front", lambda: self._trace_front(windows, kinds))
        own, *rest = builder.graft(traced, "front/", {"hidden": hidden, "past_key": past_key})
        masks = dict(zip(windows, rest, strict=False))
        angles = rest[len(windows) :]
        if self.family.positions:
            hidden = self._add_positions(builder, hidden, own)
        by_kind = {kind: tuple(angles[2 * at : 2 * at + 2]) for at, kind in enumerate(kinds)}
        return hidden, masks, by_kind

    def _once(self, key: Any, make: Callable[[], Part]) -> Part:
        if key not in self._traced:
            self._traced[key] = make()
        return self._traced[key]

    def _trace_front(self, windows: tuple[int | None, ...], kinds: tuple[str | None, ...]) -> Part:
        part = FrontPart(_static(self.model.rotary), kinds, windows)
        example = torch.ones(BATCH, TOKENS, self.size.hidden), torch.ones(BATCH, 2, PAST, 2)
        dynamic = {0: "batch", 1: "tokens"}, {0: "batch", 2: "past"}
        return trace(part, example, dynamic, ("hidden", "past_key"))

    def _add_positions(self, builder: GraphBuilder, hidden: ir.Value, own: ir.Value) -> ir.Value:
        """Learned positions."""
        table, offset = f"{self.family.positions}.weight", self.family.position_offset
        rows = builder.node("Add", [own, shape_of(builder, (offset,))], "position_rows")
        stored = lazy(lambda: self._read(table), ir.DataType.FLOAT, self.model.tensors[table].shape, table)
        learned = builder.node("Gather", [builder.tensor(table, stored), rows], "positions")
        return builder.node("Add", [hidden, learned], "positioned")

    def _add_block(
        self,
        builder: GraphBuilder,
        index: int,
        hidden: ir.Value,
        mask: ir.Value,
        angles: tuple[ir.Value, ...],
        past: list[ir.Value],
    ) -> list[ir.Value]:
        """A block's nodes; returns hidden states, keys and values."""
        part = self._traced_kind(index, len(angles))
        products = {name for name, module in self._block(index).named_modules() if isinstance(module, nn.Linear)}
        prefix = self.family.block_prefix(index)
        given = {"hidden": hidden, "mask": mask, "past_key": past[0], "past_value": past[1]}
        given |= {f"angle_{number}": angle for number, angle in enumerate(angles)}
        replaced = {}
        for name, tensor in self._block(index).state_dict().items():
            linear, _, kind = name.rpartition(".")
            if kind == "weight" and linear in products:
                replaced[name] = self._product(prefix + linear, tuple(tensor.shape), index, name)
            else:
                given[name] = self._tensor(builder, prefix + name, index, name, tensor)
        return builder.graft(part, prefix, given, replaced)

    def _product(self, linear: str, shape: tuple[int, ...], index: int, name: str) -> Any:
        coding = self.codings.get(linear, FLOAT32)

        def made(builder: GraphBuilder, left: ir.Value, output: str) -> ir.Value:
            return product(builder, left, output, linear, shape, lambda: self._weight(index, name), coding)

        return made

    def _tensor(self, builder: GraphBuilder, full: str, index: int, name: str, tensor: Tensor) -> ir.Value:
        dtype = ir.DataType.FLOAT if tensor.is_floating_point() else ir.DataType.INT64
        return builder.tensor(full, lazy(lambda: self._weight(index, name), dtype, tuple(tensor.shape), full))

    def _traced_kind(self, index: int, angles: int) -> Part:
        """The trace of blocks like this one: same ranks, same rotation, same norms; MLP widths may differ."""
        key = (*self._cache_shapes(index), self._layer_type(index), self.size.rotary_in(index), angles)
        return self._once(key, lambda: self._trace_block(index, angles))

    def _trace_block(self, index: int, angles: int) -> Part:
        part = BlockPart(self.model.block(index, self.model.block_state(index)))
        state = tuple(torch.ones_like(tensor) for tensor in part.block.state_dict().values())
        width = self.size.rotary_width
        key, value = self._cache_shapes(index)
        hidden = torch.ones(BATCH, TOKENS, self.size.hidden)
        mask = torch.zeros(1, 1, TOKENS, TOKENS + PAST)
        turned = tuple(torch.ones(1, TOKENS, width) for _ in range(angles))
        past = tuple(torch.ones(BATCH, self.size.kv_heads, PAST, rank) for rank in (key, value))
        dynamic: tuple[Any, ...] = (
            {0: "batch", 1: "tokens"},
            {2: "tokens", 3: "total"},
            (*({0: "batch", 2: "past"} for _ in past), *({1: "tokens"} for _ in turned)),
            tuple({} for _ in state),
        )
        names = [
            "hidden",
            "mask",
            "past_key",
            "past_value",
            *(f"angle_{number}" for number in range(angles)),
            *part.state,
        ]
        with grouped(self.model.config):
            return trace(part, (hidden, mask, (*past, *turned), state), dynamic, names)

    def _head(self, builder: GraphBuilder, hidden: ir.Value) -> ir.Value:
        """Final norm, head, and what comes after it; of the tokens from `first_logit` on."""
        first = builder.tensor(FIRST_LOGIT, ir.tensor(np.array([0], dtype=np.int64), name=FIRST_LOGIT))
        builder.graph.inputs.append(first)
        kept = builder.node("Slice", [hidden, first, shape_of(builder, (TO_THE_END,)), shape_of(builder, (1,))], "kept")
        with self.model.head() as (norm, *_):
            state = norm.state_dict()
            traced = self._once("norm", lambda: self._trace_norm(norm))
        prefix = f"{self.family.final_norm}."
        given = {
            name: builder.tensor(prefix + name, ir.tensor(tensor.numpy().copy(), name=prefix + name))
            for name, tensor in state.items()
        }
        (normed,) = builder.graft(traced, "norm/", {"hidden": kept, **given})
        return self._after_head(builder, self._logits(builder, normed))

    def _trace_norm(self, norm: nn.Module) -> Part:
        part = NormPart(norm)
        state = tuple(map(torch.ones_like, norm.state_dict().values()))
        dynamic: tuple[Any, ...] = {0: "batch", 1: "kept"}, tuple({} for _ in state)
        return trace(part, (torch.ones(BATCH, TOKENS, self.size.hidden), state), dynamic, ("hidden", *part.state))

    def _logits(self, builder: GraphBuilder, normed: ir.Value) -> ir.Value:
        """The head; where it is tied, its tensor is the embedding's."""
        head, table = self.family.head, self.family.embeddings
        tied = f"{head}.weight" not in self.model.tensors
        stored = f"{table if tied else head}.weight"
        shape, coding = self.model.tensors[stored].shape, self.codings.get(table if tied else head, FLOAT32)
        name = table if tied else head
        if tied and coding.kind == "float32":
            turned = builder.node("Transpose", [builder.graph.initializers[stored]], "head_weight", perm=[1, 0])
            logits = builder.node("MatMul", [normed, turned], "raw_logits")
        else:
            logits = product(builder, normed, "raw_logits", name, shape, lambda: self._read(stored), coding)
        if self.family.head_bias:
            bias = ir.tensor(self._read(f"{head}.bias").numpy().copy(), name=f"{head}.bias")
            logits = builder.node("Add", [logits, builder.tensor(f"{head}.bias", bias)], "biased_logits")
        return logits

    def _after_head(self, builder: GraphBuilder, logits: ir.Value) -> ir.Value:
        """A factor, then a cap `c tanh(logits / c)`."""
        factor = self.family.factor(self.config, self.family.logits_scale)
        if factor != 1.0:
            logits = builder.node("Mul", [logits, _number(builder, "logits_factor", torch.tensor(factor))], "factored")
        cap = getattr(self.model.config, self.family.logits_cap) if self.family.logits_cap else None
        if cap is not None:
            c = _number(builder, "logits_cap", torch.tensor(float(cap)))
            bent = builder.node("Tanh", [builder.node("Div", [logits, c], "within_cap")], "bent")
            logits = builder.node("Mul", [bent, c], "capped")
        return logits

    def _read(self, name: str) -> Tensor:
        return self.model.read(name).float()


def _static(rotary: nn.Module | None) -> nn.Module | None:
    """Angles by fixed frequencies: the plan has refused factors that change with the length of the text."""
    if getattr(rotary, "rope_type", None) != "longrope":
        return rotary
    fixed = copy.deepcopy(rotary)
    fixed.rope_type = "default"  # type: ignore[union-attr]
    return fixed


def _number(builder: GraphBuilder, name: str, value: Tensor) -> ir.Value:
    return builder.tensor(name, ir.tensor(value.float().numpy().copy(), name=name))
