"""Finished blocks on disk: a safetensors file, then a small JSON with its digest. A block counts once both agree.

Of several ranks only rank 0 writes and reads; what it reads, all get: the folder need not be shared between machines.
"""

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load, load_file, save
from torch import Tensor

from api_schemas.reports import BlockReport
from compression.core.parallel import Alone, Group
from compression.core.placement import CPU, moved
from compression.core.protocols import BlockResult
from compression.core.timeline import span


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
    """Blocks under one folder, one per recipe fingerprint.

    Attributes:
        solved_here: indices of those that this process has put there; the others come from earlier attempts.
    """

    def __init__(self, folder: Path, group: Group | None = None, *, statistics: Path | None = None) -> None:
        """Create the folder where it is absent; every method is called by all ranks of the group.

        Args:
            folder: for the blocks.
            group: the ranks; None is one process alone.
            statistics: where what was measured of the original is kept, when several stores share it.
        """
        self.folder, self.statistics, self.group = folder, statistics or folder, group or Alone()
        self.solved_here: set[int] = set()
        if self.group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, index: int) -> BlockResult | None:
        """The finished block, or None when it is absent or damaged (a damaged one is solved again)."""
        report = self.group.broadcast(self._report(index) if self.group.rank == 0 else None)
        if report is None:
            return None
        tensors, _ = self._paths(index)
        if self.group.size == 1:
            state = load_file(tensors)  # without the file's bytes beside them
        else:
            state = load(self.group.broadcast(tensors.read_bytes() if self.group.rank == 0 else None) or b"")
        return BlockResult(index=index, state=state, report=BlockReport.model_validate_json(report))

    def put(self, result: BlockResult) -> None:
        """Keep a finished block: tensors first, the record that vouches for them last.

        Raises:
            JobFailed: `ranks_disagree` when the ranks have not solved it to the same bits.
        """
        with span("write", block=result.index):
            self._put(result)
        self.solved_here.add(result.index)

    def _put(self, result: BlockResult) -> None:
        tensors, record = self._paths(result.index)
        content = save({name: tensor.cpu().contiguous() for name, tensor in result.state.items()}, {"format": "pt"})
        self.group.agree(content, f"solved block {result.index + 1}")
        if self.group.rank:
            return
        write_durably(tensors, content)
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "report": result.report.model_dump(mode="json")}
        write_durably(record, json.dumps(facts).encode())

    def part_(self) -> None:
        """All is solved: the other ranks leave, and rank 0 reads on alone."""
        self.group = Alone()

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep what was measured before the walk; rank 0's counts."""
        if self.group.rank == 0:
            write_durably(self.statistics / f"{name}.safetensors", save(moved(tensors, CPU)))

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under this name, or None."""
        path = self.statistics / f"{name}.safetensors"
        content = self.group.broadcast(path.read_bytes() if self.group.rank == 0 and path.exists() else None)
        return None if content is None else load(content)

    def _report(self, index: int) -> bytes | None:
        """A whole block's report as it lies on the disk."""
        tensors, record = self._paths(index)
        if not record.exists() or not tensors.exists():
            return None
        facts = json.loads(record.read_text())
        with tensors.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return None
        return json.dumps(facts["report"]).encode()

    def _paths(self, index: int) -> tuple[Path, Path]:
        stem = f"block-{index:05d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"
