"""What an importer reads from: published files, opened safely, each under the role that it plays.

A role is the importer's word for one download (`language`, `vision`, `delta`, …). A source is one file or a folder of
shards, pickled or safetensors; it says which tensors it has without reading them, and reads one at a time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from api_schemas.errors import InvalidCheckpoint, NotFound
from compression.core.linalg import all_finite
from compression.core.tensors import DTYPES, read_tensor
from compression.importers.pickled import BESIDE, read_pickle
from preflight.safetensors_header import TensorEntry, read_header
from preflight.shards import INDEX, SINGLE
from preflight.strict_json import read_object, shown

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFETENSORS = ".safetensors"
CHUNK_BYTES = 1024**2


@dataclass(frozen=True)
class Source:
    """One download.

    Attributes:
        role: what it is for, in the importer's words.
        files: those read, in order.
        stored: every tensor by name, mapped or as a place in a file.
        beside: what stood beside the weights, with the rule by which it is left and its bytes.
    """

    role: str
    files: tuple[Path, ...]
    stored: Mapping[str, Tensor | TensorEntry]
    beside: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.role} ({self.files[0].name if len(self.files) == 1 else self.files[0].parent.name})"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return tuple(self.stored[name].shape)

    def meta(self, name: str) -> Tensor:
        """A tensor of the same shape and dtype without content."""
        stored = self.stored[name]
        if isinstance(stored, Tensor):
            return stored.to("meta")
        if stored.dtype not in DTYPES:
            raise InvalidCheckpoint("unsupported_dtype", f"{self.label}: {name} has dtype {stored.dtype}", name)
        return Tensor().new_empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")

    def bytes(self, name: str) -> int:
        """Bytes of a stored tensor."""
        stored = self.stored[name]
        return stored.numel() * stored.element_size() if isinstance(stored, Tensor) else stored.bytes

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            InvalidCheckpoint: `non_finite_weights`, or what `read_tensor` raises.
        """
        stored = self.stored[name]
        if isinstance(stored, TensorEntry):
            return read_tensor(stored)
        tensor = stored.clone()  # off the mapped file
        if tensor.is_floating_point() and not all_finite(tensor):
            message = f"{self.label}: {name} holds NaN or infinity; the file is damaged: download it again"
            raise InvalidCheckpoint("non_finite_weights", message, name)
        return tensor

    def fingerprint(self) -> dict[str, Any]:
        """Say exactly what this source is: files with sizes and SHA-256, and a digest over names and shapes."""
        names = json.dumps([[name, list(self.shape(name))] for name in sorted(self.stored)])
        dtypes: dict[str, int] = {}
        for stored in self.stored.values():
            kind = _dtype_name(stored)
            dtypes[kind] = dtypes.get(kind, 0) + (stored.numel() if isinstance(stored, Tensor) else stored.parameters)
        return {
            "files": [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in self.files
            ],
            "tensors": len(self.stored),
            "parameters_by_dtype": dtypes,
            "layout_sha256": hashlib.sha256(names.encode()).hexdigest(),
            "left_beside_the_weights": {
                name: {"rule": rule, "bytes": size} for name, (rule, size) in sorted(self.beside.items())
            },
        }


def open_source(path: Path, role: str, beside: Mapping[str, str] = BESIDE) -> Source:
    """Open a file of weights, or a folder that has one (or shards with their index); no tensor is read.

    Args:
        path: file or folder.
        role: what it is for; the `param` of errors about it.
        beside: names that may stand beside pickled weights, each with the rule by which it is left.

    Raises:
        NotFound: `file_not_found`.
        InvalidCheckpoint: `no_weights`, `duplicate_tensor`, `missing_shard`, or what `read_pickle` and `read_header`
            raise.
    """
    if not path.exists():
        raise NotFound("file_not_found", f"{role}: there is no {path}; give the path of a file or a folder", role)
    files = (path,) if path.is_file() else tuple(path / name for name in _files_of(path, role))
    stored: dict[str, Tensor | TensorEntry] = {}
    left: dict[str, tuple[str, int]] = {}
    for file in files:
        found: Mapping[str, Tensor | TensorEntry]
        if file.name.endswith(SAFETENSORS):
            found = read_header(file)
        else:
            opened = read_pickle(file, beside)
            found, left = opened.tensors, {**left, **opened.beside}
        twice = sorted(stored.keys() & found.keys())
        if twice:
            raise InvalidCheckpoint("duplicate_tensor", f"{role}: {shown(twice[0])} is in two of its files", twice[0])
        stored |= found
    return Source(role, files, stored, left)


def _files_of(folder: Path, role: str) -> list[str]:
    """The files of weights in a folder: one, or those that an index names."""
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / index).is_file():
            placed = read_object(folder / index, "invalid_index", max_bytes=100_000_000).get("weight_map")
            names = sorted(set(placed.values())) if isinstance(placed, dict) else []
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                    message = f"{role}: {index} names {shown(name)}, which is not beside it; download it too"
                    raise InvalidCheckpoint("missing_shard", message, role)
            if names:
                return names
        if (folder / single).is_file():
            return [single]
    message = (
        f"{role}: {folder.name} has neither {SINGLE} nor {PICKLED} nor an index of shards; give the complete folder"
    )
    raise InvalidCheckpoint("no_weights", message, role)


def _dtype_name(stored: Tensor | TensorEntry) -> str:
    """Also of a dtype that nothing here reads: a tensor that is left behind may have any."""
    known = stored.dtype if isinstance(stored, Tensor) else DTYPES.get(stored.dtype)
    return str(known).removeprefix("torch.") if known is not None else str(stored.dtype)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
