"""A causal language model that is never whole in memory: embeddings, one block at a time, then norm and head."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import compression.runtime  # noqa: F401 (registers the reduced families with the Auto classes)
from api_schemas.errors import InvalidCheckpoint
from compression.core.tensors import read_tensor
from compression.runtime.models import resize_block_
from preflight.families import Family
from preflight.safetensors_header import TensorEntry, read_header

DERIVED = ".rotary_emb.inv_freq"  # old checkpoints store what the configuration says already; stock code ignores it


def tensors_of(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder by name."""
    return {name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).items()}


class StreamedModel:
    """Runs a model folder block by block in float32 on one device.

    The stock classes are built on the meta device, so a block costs memory only while it is in use.
    """

    def __init__(self, folder: Path, family: Family, tensors: Mapping[str, TensorEntry] | None = None) -> None:
        """Read configuration and headers; no weights yet.

        Args:
            folder: a model folder, stock or in layout `full`.
            family: its names.
            tensors: its headers, where they were read before.
        """
        self.folder, self.family = folder, family
        found = dict(tensors) if tensors is not None else tensors_of(folder)
        self.tensors = {name: entry for name, entry in found.items() if not name.endswith(DERIVED)}
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa", dtype=torch.float32)
        self._skeleton = skeleton.eval().requires_grad_(False)
        rotary = self._skeleton.get_submodule(family.rotary)
        self._rotary = type(rotary)(rotary.config)
        self._blocks = self._skeleton.get_submodule(family.blocks)

    @property
    def inverse_frequencies(self) -> Tensor:
        """Rotary frequencies `[head_dim / 2]` in radians per position, scaling included."""
        frequencies: Tensor = self._rotary.inv_freq
        return frequencies

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self._blocks)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype; a tied head answers with the embedding."""
        if name == f"{self.family.head}.weight" and name not in self.tensors:
            name = f"{self.family.embeddings}.weight"
        if name not in self.tensors:
            raise InvalidCheckpoint("missing_tensor", f"{self.folder.name} has no tensor {name}", name)
        return read_tensor(self.tensors[name])

    def block_state(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block in their stored dtype, named relative to it."""
        prefix = self.family.block_prefix(index)
        return {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}

    def block(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The block at `index` with these weights, in float32."""
        return self._load(copy.deepcopy(self._blocks[index]), state)

    def resized_block(
        self, index: int, state: Mapping[str, Tensor], shape: Mapping[str, int], scaling: float
    ) -> nn.Module:
        """The block at `index` narrowed to `shape`, with these weights, in float32."""
        block = copy.deepcopy(self._blocks[index])
        resize_block_(block, shape, scaling)
        return self._load(block, state)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[windows, tokens]` to hidden states `[windows, tokens, hidden]` in float32."""
        return nn.functional.embedding(tokens, self.read(f"{self.family.embeddings}.weight")).float()

    @contextmanager
    def head(self) -> Iterator[nn.Sequential]:
        """Final norm and head in float32: hidden states `[tokens, hidden]` to logits `[tokens, vocabulary]`."""
        norm = self._skeleton.get_submodule(self.family.final_norm)
        weight = self.read(f"{self.family.head}.weight").float()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        state = {"weight": self.read(f"{self.family.final_norm}.weight")}
        yield nn.Sequential(self._load(copy.deepcopy(norm), state), linear)

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """Run one block on `[windows, tokens, hidden]`, every window from position 0."""
        length = hidden.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        angles = self._rotary(hidden[:1], positions)
        output: Tensor = block(
            hidden, attention_mask=self._mask(index, length), position_ids=positions, position_embeddings=angles
        )
        return output

    def _mask(self, index: int, length: int) -> Tensor | None:
        """None where plain causality suffices; a banded mask where this block's window is shorter."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            window = None
        if window is None or window >= length:
            return None
        position = torch.arange(length)
        distance = position[:, None] - position[None, :]
        return ((distance >= 0) & (distance < window))[None, None]

    def _load(self, module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        wanted = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
        missing, unexpected = module.load_state_dict(wanted, strict=False, assign=True)
        if missing or unexpected:
            raise InvalidCheckpoint(
                "tensor_names_differ",
                f"{self.folder.name}: missing {sorted(missing)}, unexpected {sorted(unexpected)} in one block",
            )
        return module.eval().requires_grad_(False)
