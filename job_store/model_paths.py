"""Folders and files under an allowed root: what a user may say, and nothing beyond it."""

import os
from collections.abc import Sequence
from pathlib import Path

from api_schemas.errors import InvalidRequest, NotPermitted


def resolve_under_roots(path: str, roots: Sequence[Path]) -> Path:
    """Return the folder a user pointed at, its links followed, if it lies under an allowed root.

    Links inside the folder are refused by `preflight.checkpoint.open_checkpoint`.

    Raises:
        NotPermitted: `path_not_allowed`; also for a path outside that does not exist, so nobody learns what does.
        InvalidRequest: `unsafe_path`; `path_not_found`, inside a root only.
    """
    folder = _resolve(path, roots, "path")
    if not os.path.isdir(folder):  # unlike Path.is_dir, it takes a name that is too long as an answer
        raise InvalidRequest("path_not_found", f"path {path!r} is no folder on the server", "path")
    return folder


def resolve_text_under_roots(path: str, roots: Sequence[Path], param: str) -> Path:
    """Return the text file a user pointed at; raises like `resolve_under_roots`, naming `param`."""
    file = _resolve(path, roots, param)
    if not os.path.isfile(file):
        raise InvalidRequest("path_not_found", f"{param} {path!r} is no file on the server", param)
    return file


def resolve_original_under_roots(path: str, roots: Sequence[Path], param: str) -> Path:
    """Return the file or folder of published weights a user pointed at; links in it must not leave the roots.

    Raises:
        NotPermitted: `path_not_allowed`.
        InvalidRequest: `unsafe_path` or `path_not_found`.
    """
    found = _resolve(path, roots, param)
    if os.path.isfile(found):
        return found
    if not os.path.isdir(found):
        raise InvalidRequest("path_not_found", f"{param} {path!r} is no file or folder on the server", param)
    for entry in found.iterdir():
        if entry.is_symlink():
            _resolve(str(entry), roots, param)
    return found


def _resolve(path: str, roots: Sequence[Path], param: str) -> Path:
    if "\0" in path:
        raise InvalidRequest("unsafe_path", f"{param} {path!r} holds a NUL character; remove it", param)
    if not Path(path).is_absolute():
        raise InvalidRequest("unsafe_path", f"{param} {path!r} is relative; give an absolute path on the server", param)
    found = Path(os.path.realpath(path))  # unlike Path.resolve, it does not raise on a loop of links
    if not _inside(found, roots):
        allowed = ", ".join(str(root) for root in roots) or "none"
        message = f"{param} {path!r} is under no allowed root ({allowed}); set MODEPRESS_MODEL_ROOTS on the server"
        raise NotPermitted("path_not_allowed", message, param)
    return found


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path == root or root in path.parents for root in roots)
