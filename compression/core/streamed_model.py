"""A causal language model that is never whole in memory: embeddings, one block at a time, then norm and head."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

import compression.runtime  # noqa: F401 (registers the reduced families with the Auto classes)
from api_schemas.errors import InvalidCheckpoint
from compression.core.canonical import to_canonical
from compression.core.int8_rows import ABSMAX, rounded_inputs
from compression.core.packed_forms import count_stored, unpacked
from compression.core.placement import CPU, moved
from compression.core.quantized_config import outlier_threshold
from compression.core.tensors import read_tensor
from compression.core.timeline import passed, span
from compression.runtime.blocks import resize_block_
from preflight.composites import place
from preflight.families import Dimensions, Family
from preflight.safetensors_header import TensorEntry, read_header
from preflight.tensor_check import OLD_BUFFERS


def tensors_of(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder by name."""
    return {name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).items()}


class _Logits(nn.Module):
    """What some families do to the head's outputs: a factor, then a cap `c tanh(logits / c)`."""

    def __init__(self, scale: float, cap: float | None) -> None:
        super().__init__()
        self.scale, self.cap = scale, cap

    def forward(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class StreamedModel:
    """Runs a model folder block by block in float32 on one device.

    The stock classes are built on the meta device, so a block costs memory only while it is in use. Where the decoder
    is one part of several, only it is run: `placed` knows the others.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        tensors: Mapping[str, TensorEntry] | None = None,
        config: Mapping[str, Any] | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Read configuration and headers; no weights yet.

        Args:
            folder: a model folder, stock or in layout `full`.
            family: its names.
            tensors: the decoder's headers under the text model's names, where they were read before.
            config: the decoder's settings to take instead of those in the folder, of the same model type.
            device: where it runs; outside of it, run it within `placed_on`.
        """
        self.folder, self.family, self.device = folder, family, device
        whole: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        stored_tensors = tensors_of(folder)
        self.placed = place(json.loads((folder / "config.json").read_text(encoding="utf-8")), stored_tensors)
        stored = whole
        if self.placed is not None:
            stored, stored_tensors = whole.text_config, self.placed.tensors
            stored.tie_word_embeddings = self.placed.view["tie_word_embeddings"]
        found = family.full_names(dict(tensors) if tensors is not None else stored_tensors)
        self.tensors = {name: entry for name, entry in found.items() if not name.endswith(OLD_BUFFERS)}
        self.config = stored if config is None else type(stored).from_dict(dict(config))
        self._threshold = outlier_threshold(getattr(whole, "quantization_config", None))
        self._eager = bool(family.attention_cap)  # fused kernels have no caps
        self._in_bfloat16 = False
        shapes = getattr(self.config, "block_shapes", None) or getattr(whole, "block_shapes", None)
        self._reduced = shapes is not None
        self._skeleton: Any = self._build(shapes).eval().requires_grad_(False)
        self._rotary: nn.Module | None = None
        if family.rotary:
            rotary = self._skeleton.get_submodule(family.rotary)
            self._rotary = type(rotary)(rotary.config).to(device)
        self._blocks: Any = self._skeleton.get_submodule(family.blocks)

    def _build(self, shapes: Sequence[Mapping[str, int]] | None) -> nn.Module:
        """The stock decoder without weights, under the names of the family's table."""
        loader, settings = AutoModelForCausalLM, {"attn_implementation": "eager" if self._eager else "sdpa"}
        if self.placed is not None:
            loader = AutoModel
        with torch.device("meta"):
            model: nn.Module = loader.from_config(self.config, dtype=torch.float32, **settings)
            if self.placed is None:
                return model
            whole = nn.Module()
            whole.add_module("model", model)
            if self.placed.composite.fixed_decoder and shapes is not None:
                blocks: Any = whole.get_submodule(self.family.blocks)
                for block, shape in zip(blocks, shapes, strict=True):
                    resize_block_(block, shape)
        return whole

    @property
    def size(self) -> Dimensions:
        """The sizes of the model; widths per block are not in it."""
        return self.family.dimensions(self.config.to_dict())

    @property
    def inverse_frequencies(self) -> Tensor:
        """Rotary frequencies `[rotary width / 2]` in radians per position, scaling included; in host memory."""
        if self._rotary is None:
            raise ValueError(f"{self.family.name} has no rotary embedding")
        frequencies: Tensor = self._rotary.get_buffer("inv_freq")
        return frequencies.cpu()

    @property
    def rotary(self) -> nn.Module | None:
        """The module that makes angles of positions; None where there are none."""
        return self._rotary

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self._blocks)

    @property
    def parameters(self) -> int:
        """How many all parts have: a tied head is stored once, packed weights count as what they stand for."""
        others = {} if self.placed is None else self.placed.others
        return count_stored(self.tensors, self.read) + count_stored(others, self.read)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype; a tied head answers with the embedding."""
        if name == f"{self.family.head}.weight" and name not in self.tensors:
            name = f"{self.family.embeddings}.weight"
        if name not in self.tensors:
            raise InvalidCheckpoint("missing_tensor", f"{self.folder.name} has no tensor {name}", name)
        return read_tensor(self.tensors[name])

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The canonical tensors of one block in their stored dtype, named relative to it; packed ones are unpacked."""
        prefix = self.family.block_prefix(index)
        with span("load", block=index):
            state = {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}
            state = unpacked(moved(state, self.device))
            return state if self._reduced else to_canonical(self.family, self.size, state)

    def block(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The block at `index` with these weights, in float32; it has the family's linears under canonical names."""
        block = copy.deepcopy(self._blocks[index])
        if not self._reduced and not self.family.stored_canonically:
            size = self.size
            whole = {"mlp_width": size.mlp_width, "query_key_rank": size.head_dim, "value_output_rank": size.head_dim}
            resize_block_(block, whole)
            pairs = torch.arange(size.rotary_in(index) // 2, device=self.device)
            if len(pairs):
                state = {**state, f"{self.family.attention.module}.rotary_pairs": pairs.expand(size.kv_heads, -1)}
        return self._rounding(self._load(block, state), index)

    def _rounding(self, block: nn.Module, index: int) -> nn.Module:
        """The block with the inputs of its linears rounded as LLM.int8's kernels round them, where it is stored so."""
        if self._threshold is None:
            return block
        threshold, prefix = self._threshold, self.family.block_prefix(index)
        parts = {one.stored: one.parts for one in self.family.fused if not self._reduced}
        for name in self.tensors:
            if name.startswith(prefix) and name.endswith(f".{ABSMAX}"):
                stored = self.family.canonical_block_name(name.removeprefix(prefix).removesuffix(f".{ABSMAX}"))
                for linear in parts.get(stored, (stored,)):
                    block.get_submodule(linear).register_forward_pre_hook(
                        lambda _module, inputs: (rounded_inputs(inputs[0], threshold),)
                    )
        return block

    def resized_block(
        self, index: int, state: Mapping[str, Tensor], shape: Mapping[str, int], scaling: float
    ) -> nn.Module:
        """The block at `index` narrowed to `shape`, with these weights, in float32."""
        block = copy.deepcopy(self._blocks[index])
        resize_block_(block, shape, scaling)
        return self._load(block, state)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[windows, tokens]` to hidden states `[windows, tokens, hidden]` in float32."""
        with span("load", "embeddings"):
            weight = self.read(f"{self.family.embeddings}.weight")
        hidden = nn.functional.embedding(tokens.cpu(), weight).float()  # a few rows of it are wanted: it stays behind
        if self.family.embedding_scale is not None:
            factor = self.family.factor(self.config.to_dict(), self.family.embedding_scale)
            # stock code rounds it to the weights' dtype
            hidden *= torch.tensor(factor, device=CPU).to(weight.dtype).float()
        if self.family.positions:
            rows = torch.arange(tokens.shape[1], device=CPU) + self.family.position_offset
            hidden += nn.functional.embedding(rows, self.read(f"{self.family.positions}.weight")).float()
        return hidden.to(self.device)

    @contextmanager
    def head(self) -> Iterator[nn.Sequential]:
        """Final norm and head in float32: hidden states `[tokens, hidden]` to logits `[tokens, vocabulary]`."""
        prefix = f"{self.family.final_norm}."
        norm = copy.deepcopy(self._skeleton.get_submodule(self.family.final_norm))
        state = {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}
        weight = self.read(f"{self.family.head}.weight").to(self.device).float()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.family.head_bias, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.family.head_bias:
            linear.bias = nn.Parameter(
                self.read(f"{self.family.head}.bias").to(self.device).float(), requires_grad=False
            )
        yield nn.Sequential(self._load(norm, state), linear, self._logits())

    def _logits(self) -> nn.Module:
        """What comes after the head's linear: nothing in a composite, whose stock class has a plain head."""
        if self.placed is not None:
            return nn.Identity()
        cap = getattr(self.config, self.family.logits_cap) if self.family.logits_cap else None
        return _Logits(self.family.factor(self.config.to_dict(), self.family.logits_scale), cap)

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """Run one block on `[windows, tokens, hidden]`, every window from position 0."""
        length = hidden.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        angles = {}
        if self._rotary is not None:
            which = (self.config.layer_types[index],) if self.family.rotary_by_layer_type else ()
            angles["position_embeddings"] = self._rotary(hidden[:1], positions, *which)
        autocast = torch.autocast(hidden.device.type, torch.bfloat16, enabled=self._in_bfloat16)
        with span("forward", block=index), autocast:
            output: Tensor = block(hidden, attention_mask=self._mask(index, length), position_ids=positions, **angles)
        passed(hidden.shape[0] * length)
        return output

    @contextmanager
    def products_in(self, dtype: str) -> Iterator[None]:
        """Blocks multiply in `float32` or `bfloat16` for a while; the stream and the norms stay in float32."""
        before, self._in_bfloat16 = self._in_bfloat16, dtype == "bfloat16"
        try:
            yield
        finally:
            self._in_bfloat16 = before

    def _mask(self, index: int, length: int) -> Tensor | None:
        """None where plain causality suffices; a banded mask where this block's window is shorter.

        The plain kernel, which a few families need, knows no causality: it adds the mask it is given.
        """
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            window = None
        if (window is None or window >= length) and not self._eager:
            return None
        position = torch.arange(length)
        distance = position[:, None] - position[None, :]
        seen = ((distance >= 0) & (distance < (window or length)))[None, None]
        return torch.zeros(1).masked_fill(~seen, torch.finfo(torch.float32).min) if self._eager else seen

    def _load(self, module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        with span("load", "to float32"):
            wanted = {name: t.float() if t.is_floating_point() else t for name, t in moved(state, self.device).items()}
        missing, unexpected = module.load_state_dict(wanted, strict=False, assign=True)
        if missing or unexpected:
            raise InvalidCheckpoint(
                "tensor_names_differ",
                f"{self.folder.name}: missing {sorted(missing)}, unexpected {sorted(unexpected)} in one block",
            )
        return module.eval().requires_grad_(False)
