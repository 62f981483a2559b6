"""Names inside a model folder, and folders under an allowed root: what a user may say, and nothing beyond it."""

import os
from collections.abc import Sequence
from pathlib import Path

from api_schemas.errors import InvalidRequest, NotPermitted

MAX_COMPONENT_BYTES = 200


def check_relative_paths(paths: Sequence[str]) -> None:
    """Refuse names that could leave the model folder, collide in it, or hide something.

    Raises:
        InvalidRequest: `unsafe_path` or `duplicate_path`; `param` names the entry.
    """
    seen: dict[str, int] = {}
    for index, path in enumerate(paths):
        param = f"files.{index}.path"
        if (reason := _unsafe(path)) is not None:
            message = f"path {path!r} {reason}; use a plain relative name such as 'model.safetensors'"
            raise InvalidRequest("unsafe_path", message, param)
        folded = path.casefold()  # the folder may be copied to a disk that does not tell 'A' from 'a'
        if folded in seen:
            raise InvalidRequest("duplicate_path", f"path {path!r} appears twice; name each file once", param)
        seen[folded] = index
    for folded, index in seen.items():
        parts = folded.split("/")
        if any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            message = f"path {paths[index]!r} lies inside another file of the list; a file cannot be a folder too"
            raise InvalidRequest("duplicate_path", message, f"files.{index}.path")


def _unsafe(path: str) -> str | None:
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in path):
        return "holds a control character"
    if not path.isprintable():
        return "holds a character that cannot be shown"
    if "\\" in path or ":" in path:
        return "holds a backslash or a colon"
    if path.startswith(("/", "~")):
        return "is absolute"
    for component in path.split("/"):
        if component in ("", ".", ".."):
            return f"holds the component {component!r}"
        if component != component.strip() or component.endswith("."):
            return "has a component that begins or ends with a space, or ends with a dot"
        if len(component.encode()) > MAX_COMPONENT_BYTES:
            return f"has a component of more than {MAX_COMPONENT_BYTES} bytes"
    return None


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
