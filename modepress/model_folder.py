"""Which files of a model folder are pushed, and which stay at home with a reason that is told."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from api_schemas.errors import InvalidRequest

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
OTHER_WEIGHTS = frozenset({".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".ot", ".npz", ".mlmodel"})
READ_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class FolderFile:
    """A file to push: where it lies, and its name inside the model."""

    path: Path
    name: str
    bytes: int


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds for the server, and what it holds besides."""

    files: tuple[FolderFile, ...]
    skipped: dict[str, str]

    @property
    def bytes(self) -> int:
        """Of all files to push."""
        return sum(file.bytes for file in self.files)


def look_into(folder: Path) -> ModelFolder:
    """Choose the files to push.

    Raises:
        InvalidRequest: the folder is missing or holds no safetensors file.
    """
    if not folder.is_dir():
        raise InvalidRequest(
            "folder_missing", f"folder {str(folder)!r} does not exist; give the model's folder", "folder"
        )
    files, skipped = list[FolderFile](), dict[str, str]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        if path.suffix in PICKLES:
            skipped[name] = "a pickle can run code when it is read; the server takes safetensors"
        elif path.suffix in OTHER_WEIGHTS:
            skipped[name] = "weights in another format; the server takes safetensors"
        else:
            files.append(FolderFile(path, name, path.stat().st_size))
    if not any(file.path.suffix == ".safetensors" for file in files):
        found = ", ".join(skipped) or "no weights at all"
        raise InvalidRequest(
            "no_safetensors",
            f"folder {str(folder)!r} holds no .safetensors file ({found}); save the model with safetensors first",
            "folder",
        )
    return ModelFolder(tuple(files), skipped)


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Digest of a file, read in pieces; `on_bytes` hears how many bytes each piece had."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()
