"""Names inside a model folder. Server and client check them alike: neither lets the other write outside a folder."""

from collections.abc import Sequence

from api_schemas.errors import InvalidRequest

MAX_COMPONENT_BYTES = 200


def check_relative_path(path: str, param: str) -> None:
    """Refuse a name that could leave a model's folder or hide something. Raises InvalidRequest `unsafe_path`."""
    if (reason := unsafe(path)) is not None:
        message = f"path {path!r} {reason}; use a plain relative name such as 'model.safetensors'"
        raise InvalidRequest("unsafe_path", message, param)


def check_relative_paths(paths: Sequence[str]) -> None:
    """Refuse names that could leave the model folder, collide in it, or hide something.

    Raises:
        InvalidRequest: `unsafe_path` or `duplicate_path`; `param` names the entry.
    """
    seen: dict[str, int] = {}
    for index, path in enumerate(paths):
        param = f"files.{index}.path"
        check_relative_path(path, param)
        folded = path.casefold()  # the folder may be copied to a disk that does not tell 'A' from 'a'
        if folded in seen:
            raise InvalidRequest("duplicate_path", f"path {path!r} appears twice; name each file once", param)
        seen[folded] = index
    for folded, index in seen.items():
        parts = folded.split("/")
        if any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            message = f"path {paths[index]!r} lies inside another file of the list; a file cannot be a folder too"
            raise InvalidRequest("duplicate_path", message, f"files.{index}.path")


def unsafe(path: str) -> str | None:
    """Say why a name is none that a model folder may hold; None when it may."""
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
