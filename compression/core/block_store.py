"""Finished blocks on disk: a safetensors file, then a small JSON with its digest. A block counts once both agree."""

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save

from api_schemas.reports import BlockReport
from compression.core.protocols import BlockResult


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent: temporary name, fsync, rename, fsync of the folder."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderBlockStore:
    """Blocks under one folder, one per recipe fingerprint."""

    def __init__(self, folder: Path, statistics: Path | None = None) -> None:
        """Create the folder where it is absent.

        Args:
            folder: for the blocks.
            statistics: where what was measured of the original is kept, when several stores share it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.statistics = folder, statistics or folder

    def get(self, index: int) -> BlockResult | None:
        """The finished block, or None when it is absent or damaged (a damaged one is solved again)."""
        tensors, record = self._paths(index)
        if not record.exists() or not tensors.exists():
            return None
        facts = json.loads(record.read_text())
        with tensors.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return None
        state = load_file(tensors)
        return BlockResult(index=index, state=state, report=BlockReport.model_validate(facts["report"]))

    def put(self, result: BlockResult) -> None:
        """Keep a finished block: tensors first, the record that vouches for them last."""
        tensors, record = self._paths(result.index)
        content = save({name: tensor.contiguous() for name, tensor in result.state.items()}, {"format": "pt"})
        write_durably(tensors, content)
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "report": result.report.model_dump(mode="json")}
        write_durably(record, json.dumps(facts).encode())

    def _paths(self, index: int) -> tuple[Path, Path]:
        stem = f"block-{index:05d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"
