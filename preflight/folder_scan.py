"""Looks at every file of a model folder before any is parsed; refuses links, devices, pickles, archives and code.

Nothing here opens a file in a way that could run or unpack it: names, file kinds and first bytes decide.
"""

import hashlib
import os
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from api_schemas.errors import InvalidCheckpoint
from preflight.strict_json import shown

MAX_FILES = 10_000
MAX_DEPTH = 8
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy"}
ARCHIVE_SUFFIXES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".lz4", ".npz", ".whl", ".jar"}
CODE_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".exe"}
ARCHIVE_MAGIC = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
HEAD_BYTES = 512
# Code that this project writes for others to run and never runs itself: by place and by content. A changed file gets a
# further digest, so that older artifacts stay welcome.
OUR_CODE = {
    "exports/vllm/configuration_decilm.py": {"3c992822949b582ebdb8fd9dde1ac8a7c077fb7f32c1862100784d1b553867bb"}
}
BINARY_PICKLE = re.compile(rb"\x80[\x02-\x05]")
TEXT_PICKLE = re.compile(rb"\(?c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")


@dataclass(frozen=True)
class FolderContents:
    """What lies in a model folder: paths relative to it, with forward slashes."""

    files: tuple[str, ...]
    nested: tuple[str, ...]


def scan(folder: Path) -> FolderContents:
    """List a model folder and refuse what must not be in it.

    Raises:
        InvalidCheckpoint: `folder_not_found`, `too_many_files`, `symlink_refused`, `special_file_refused`,
            `pickle_refused`, `archive_not_accepted` or `remote_code_refused`; `param` is the file's name.
    """
    if not folder.is_dir():
        raise InvalidCheckpoint(
            "folder_not_found", f"{folder} is not a folder; name one that holds config.json", "path"
        )
    found: list[str] = []
    _walk(folder, "", 0, found)
    found.sort()
    return FolderContents(
        files=tuple(name for name in found if "/" not in name), nested=tuple(name for name in found if "/" in name)
    )


def _is_folder(path: Path) -> bool:
    """As Path.is_dir, but a folder that may not be looked at is an OSError, not an absent one."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _walk(folder: Path, prefix: str, depth: int, found: list[str]) -> None:
    if depth > MAX_DEPTH:
        raise InvalidCheckpoint("too_many_files", f"{prefix} is nested deeper than {MAX_DEPTH} folders", prefix)
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise InvalidCheckpoint(
                    "symlink_refused", f"{shown(name)} is a symbolic link; push a copy of the file it names", name
                )
            if stat.S_ISDIR(mode):
                _walk(Path(entry.path), f"{name}/", depth + 1, found)
                continue
            if not stat.S_ISREG(mode):
                raise InvalidCheckpoint(
                    "special_file_refused", f"{shown(name)} is a pipe, socket or device; remove it", name
                )
            if not _is_our_code(Path(entry.path), name):
                _refuse_by_name(name)
            _refuse_by_content(Path(entry.path), name)
            found.append(name)
            if len(found) > MAX_FILES:
                raise InvalidCheckpoint("too_many_files", f"the folder holds more than {MAX_FILES} files", "path")


def _pickle(name: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        "pickle_refused",
        f"{shown(name)} is a pickle, which can run code when it is loaded; push safetensors instead and remove it",
        name,
    )


def _archive(name: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        "archive_not_accepted", f"{shown(name)} is an archive; push the files that are in it one by one", name
    )


def _is_our_code(path: Path, name: str) -> bool:
    return name in OUR_CODE and hashlib.sha256(path.read_bytes()).hexdigest() in OUR_CODE[name]


def _refuse_by_name(name: str) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise _pickle(name)
    if suffix in ARCHIVE_SUFFIXES:
        raise _archive(name)
    if suffix in CODE_SUFFIXES:
        raise InvalidCheckpoint(
            "remote_code_refused",
            f"{shown(name)} is program code; this server runs only architectures it knows, remove the file",
            name,
        )


def _refuse_by_content(path: Path, name: str) -> None:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if _looks_like_safetensors(head):
        return
    if BINARY_PICKLE.match(head) or TEXT_PICKLE.match(head):
        raise _pickle(name)
    if head.startswith(ARCHIVE_MAGIC) or head[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        raise _pickle(name) if _holds_pickle(path) else _archive(name)


def _looks_like_safetensors(head: bytes) -> bool:
    """A header length below 2**32 and its brace: the length's low bytes may look like any other magic."""
    return head[4:9] == b"\x00\x00\x00\x00{"


def _holds_pickle(path: Path) -> bool:
    """Whether a zip has the member `data.pkl` that torch.save writes; only the list of members is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.endswith(".pkl") for member in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return False
