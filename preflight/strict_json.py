"""JSON from strangers: bounded in size and in number of values, no duplicate keys, no NaN, an object on top."""

import json
import math
from pathlib import Path
from typing import Any

from api_schemas.errors import InvalidCheckpoint

MAX_CONFIG_BYTES = 4 * 1024**2
MAX_VALUES = 4_000_000  # a parsed value takes about a hundred bytes: this bounds memory below half a gigabyte


def shown(text: object, limit: int = 120) -> str:
    """Return a stranger's text quoted and cut short, fit for an error message."""
    try:
        quoted = repr(text)
    except RecursionError:
        return f"a deeply nested {type(text).__name__}"
    return quoted if len(quoted) <= limit else quoted[: limit - 1] + "…"


def shown_list(names: list[str], limit: int = 5) -> str:
    """Return the first few names of a list and how many more there are."""
    rest = len(names) - limit
    return ", ".join(shown(name) for name in names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def read_object(path: Path, code: str, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file; its name becomes the error's `param`.
        code: code of the error when it is not sound.
        max_bytes: a larger file is refused before it is read.

    Raises:
        InvalidCheckpoint: with `code`.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InvalidCheckpoint(code, f"{path.name} is larger than {max_bytes} bytes", path.name)
    return parse_object(data, code, path.name)


def parse_object(data: bytes, code: str, name: str) -> dict[str, Any]:
    """Parse a JSON object; `name` says in the message where it came from.

    Raises:
        InvalidCheckpoint: with `code`: not UTF-8, not JSON, nested too deeply, too many values, a duplicate key,
            a number that is not finite, or something other than an object.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise InvalidCheckpoint(code, f"{name} holds more than {MAX_VALUES} JSON values; this is no model's file", name)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError as error:
        raise InvalidCheckpoint(
            code, f"{name} is nested too deeply; push the file as it was published", name
        ) from error
    except ValueError as error:
        raise InvalidCheckpoint(code, f"{name} is not sound JSON ({error}); push the file again", name) from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(code, f"{name} holds a JSON {type(value).__name__}, not an object", name)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {shown(twice)}")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value
