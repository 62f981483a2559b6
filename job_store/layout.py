"""Where everything lies under the data folder, and how bytes get there: whole or not at all.

blobs/<aa>/<sha256>     stored files, shared by equal content
uploads/<upload id>/    parts of uploads under way
models/<model id>/      registered models and finished artifacts
jobs/<job id>/          job.json, blocks/, trace/, attempt-<fence>/
tmp/  logs/             scratch on the same file system, and logs
"""

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("blobs", "uploads", "models", "jobs", "tmp", "logs")


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and every name under a folder durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file by temporary name, fsync and rename: a reader sees all of it or nothing.

    Raises:
        OSError: the disk is full or the folder is missing; no temporary file stays behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove a folder that may be gone already, or that another process is removing too."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue


@dataclass(frozen=True)
class Layout:
    """The folders under one data folder."""

    home: Path

    def prepare(self) -> "Layout":
        """Create the folders that are missing, readable by this user alone, and return self."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in FOLDERS:
            (self.home / name).mkdir(exist_ok=True)
        return self

    def blob(self, sha256: str) -> Path:
        """Return where a stored file with this digest lies."""
        return self.home / "blobs" / sha256[:2] / sha256

    def upload(self, upload_id: str) -> Path:
        """Return the folder of an upload under way."""
        return self.home / "uploads" / upload_id

    def model(self, model_id: str) -> Path:
        """Return the folder of a registered model."""
        return self.home / "models" / model_id

    def job(self, job_id: str) -> Path:
        """Return the folder of a job."""
        return self.home / "jobs" / job_id

    def blocks(self, job_id: str) -> Path:
        """Return the folder of a job's per-block results, which all its attempts share."""
        return self.job(job_id) / "blocks"

    def attempt(self, job_id: str, fence: int) -> Path:
        """Return the folder of one attempt at a job."""
        return self.job(job_id) / f"attempt-{fence}"

    def trace(self, job_id: str) -> Path:
        """Return the folder of a job's time line, one file per attempt and writer."""
        return self.job(job_id) / "trace"

    def scratch(self, label: str) -> Path:
        """Return a fresh path under tmp/, on the file system of everything else; nothing is created."""
        return self.home / "tmp" / f"{label}.{uuid.uuid4().hex}"

    @property
    def logs(self) -> Path:
        """The folder of log files."""
        return self.home / "logs"
