"""One table per architecture; the module's name is the checkpoint's `model_type`."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.families.spec import Dimensions, Family

__all__ = ["Dimensions", "Family", "known_families", "resolve"]

_NOT_FAMILIES = {"spec"}


def known_families() -> tuple[str, ...]:
    """The `model_type`s that have a table, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_FAMILIES))


def resolve(config: Mapping[str, Any]) -> Family:
    """Return the table for a checkpoint's configuration.

    Raises:
        InvalidCheckpoint: `unsupported_architecture`, or `invalid_config` when a size is missing or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in known_families():
        raise InvalidCheckpoint(
            "unsupported_architecture",
            f"config.json: model_type {model_type!r} has no family table; known are {', '.join(known_families())}",
            "model_type",
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    _check_sizes(family, config)
    return family


def _check_sizes(family: Family, config: Mapping[str, Any]) -> None:
    try:
        size = family.dimensions(config)
    except KeyError as missing:
        raise InvalidCheckpoint(
            "invalid_config", f"config.json: {missing.args[0]!r} is missing; a {family.name} needs it", missing.args[0]
        ) from missing
    except (TypeError, ValueError, ZeroDivisionError) as wrong:
        raise InvalidCheckpoint("invalid_config", f"config.json: a size is not a positive number: {wrong}") from wrong
    sizes = {name: value for name, value in vars(size).items() if name != "tied_head"}
    for name, value in sizes.items():
        if not 0 < value < 2**31:
            raise InvalidCheckpoint("invalid_config", f"config.json: {name} is {value}; it must be positive", name)
    if size.heads % size.kv_heads:
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: num_attention_heads {size.heads} is not a multiple of num_key_value_heads {size.kv_heads}",
            "num_key_value_heads",
        )
    if size.head_dim % 2:
        raise InvalidCheckpoint("invalid_config", f"config.json: head_dim {size.head_dim} is odd", "head_dim")
