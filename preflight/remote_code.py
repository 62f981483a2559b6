"""Refuses configurations that ask a loader to fetch or run code."""

from collections.abc import Iterator, Mapping
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.strict_json import shown

CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")


def refuse_remote_code(settings: Mapping[str, Any], file: str) -> None:
    """Look through a settings file at every depth.

    Raises:
        InvalidCheckpoint: `remote_code_refused`: a key that names classes to import, or an attention implementation
            that transformers would download as a kernel.
    """
    for key, value in _items(settings):
        asks_for_kernel = "attn_implementation" in key and isinstance(value, str) and "/" in value
        if asks_for_kernel or (key in CODE_KEYS and value):
            raise InvalidCheckpoint(
                "remote_code_refused",
                f"{file}: {key} is {shown(value)}, code from elsewhere; this server runs only architectures it knows, "
                "remove the key if the model needs no code of its own",
                key,
            )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, Mapping):
            yield from current.items()
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)
