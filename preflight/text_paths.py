"""Which server-side text files a user may name."""

import stat
from collections.abc import Sequence
from pathlib import Path

from api_schemas.errors import InvalidCalibration
from preflight.strict_json import shown


def resolve_text_path(path: str, roots: Sequence[Path] | None, param: str) -> Path:
    """Return the real path of a text file, links followed.

    Args:
        path: what the user wrote.
        roots: folders it must lie under once links are followed; None allows any (command line use).
        param: dotted path of the field, for errors.

    Raises:
        InvalidCalibration: `path_not_allowed` (said before whether the file exists), `text_not_found` or `not_a_file`.
    """
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidCalibration("path_not_allowed", f"{param} {shown(path)} is no path: {error}", param) from error
    if roots is not None and not any(resolved.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(str(root) for root in roots) or "none; upload the text instead"
        raise InvalidCalibration(
            "path_not_allowed", f"{param} {shown(path)} is not under a folder this server allows ({allowed})", param
        )
    try:
        mode = resolved.stat().st_mode
    except OSError as error:
        raise InvalidCalibration(
            "text_not_found", f"{param} {shown(path)}: {error.strerror}; name a file", param
        ) from error
    if not stat.S_ISREG(mode):
        raise InvalidCalibration(
            "not_a_file", f"{param} {shown(path)} is not a plain file; name a .txt or .jsonl", param
        )
    return resolved
