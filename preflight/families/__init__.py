"""One table per architecture; the module's name is the checkpoint's `model_type`."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.families.dimensions import Dimensions
from preflight.families.spec import Family

__all__ = ["Dimensions", "Family", "known_decoders", "known_families", "resolve", "table"]

_NOT_FAMILIES = {"dimensions", "parts", "spec"}


@cache
def known_families() -> tuple[str, ...]:
    """The `model_type`s of text models that have a table, sorted."""
    return tuple(name for name in known_decoders() if table(name).alone)


@cache
def known_decoders() -> tuple[str, ...]:
    """All that have a table, also those that are only found inside a composite, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_FAMILIES))


def table(name: str) -> Family:
    """The table of one of `known_decoders()`."""
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family


def resolve(config: Mapping[str, Any]) -> Family:
    """Return the table for a checkpoint's configuration.

    Raises:
        InvalidCheckpoint: `unsupported_architecture` for another model type or a variant that its table does not
            hold for, `invalid_config` when a size is missing or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in known_decoders():
        raise InvalidCheckpoint(
            "unsupported_architecture",
            f"config.json: model_type {model_type!r} has no family table; known are {', '.join(known_families())}",
            "model_type",
        )
    family = table(model_type)
    _check_variant(family, config)
    _check_sizes(family, config)
    return family


def _check_variant(family: Family, config: Mapping[str, Any]) -> None:
    for key, allowed in family.only.items():
        if key in config and config[key] not in allowed:
            raise InvalidCheckpoint(
                "unsupported_architecture",
                f"config.json: {key} {config[key]!r} is a variant of {family.name} that cannot be compressed; only "
                f"{' or '.join(repr(value) for value in allowed)} can",
                key,
            )


def _check_sizes(family: Family, config: Mapping[str, Any]) -> None:
    try:
        size = family.dimensions(config)
    except KeyError as missing:
        raise InvalidCheckpoint(
            "invalid_config", f"config.json: {missing.args[0]!r} is missing; a {family.name} needs it", missing.args[0]
        ) from missing
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError) as wrong:
        raise InvalidCheckpoint("invalid_config", f"config.json: a size is not a positive number: {wrong}") from wrong
    for name in ("hidden", "heads", "kv_heads", "head_dim", "mlp_width", "blocks", "vocabulary", "experts", "routed"):
        value = getattr(size, name)
        if not 0 < value < 2**31:
            raise InvalidCheckpoint("invalid_config", f"config.json: {name} is {value}; it must be positive", name)
    if size.heads % size.kv_heads:
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: num_attention_heads {size.heads} is not a multiple of num_key_value_heads {size.kv_heads}",
            "num_key_value_heads",
        )
    if size.routed > size.experts:
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: each token would see {size.routed} of {size.experts} experts",
            "num_experts_per_tok",
        )
    if size.head_dim % 2:
        raise InvalidCheckpoint("invalid_config", f"config.json: head_dim {size.head_dim} is odd", "head_dim")
    if size.rotary_width % 2 or not 0 <= size.rotary_width <= size.head_dim:
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: {size.rotary_width} of {size.head_dim} channels per head would be rotated; an even number "
            "of them can be",
            "partial_rotary_factor",
        )
    if size.rotates is not None and len(size.rotates) < size.blocks:
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: {len(size.rotates)} flags of rotary embedding for {size.blocks} blocks",
            "rotary",
        )
