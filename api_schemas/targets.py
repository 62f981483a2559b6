"""A goal instead of a sparsity: how large the compressed model may be."""

import re
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from api_schemas.base import Frozen

UNITS = {
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
SIZE = re.compile(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,6}})?) ?({'|'.join(UNITS)})")
LARGEST = 2**62
Goal = Literal["parameters", "bytes"]


def parse_size(said: Any) -> Any:
    """Bytes of '8 GB' (10⁹), '90 MiB' (2²⁰) and the like; anything but text is handed on.

    Raises:
        ValueError: the text is no number with one of `UNITS`, or no whole number of bytes.
    """
    if not isinstance(said, str):
        return said
    match = SIZE.fullmatch(said)
    if match is None:
        raise ValueError(f"size {said!r} must be a number and one of {', '.join(UNITS)}, as in '8 GB' or '90 MiB'")
    exact = Decimal(match[1]) * UNITS[match[2]]
    if exact != exact.to_integral_value():
        raise ValueError(f"size {said!r} is no whole number of bytes")
    return int(exact)


Bytes = Annotated[
    int,
    Field(strict=True, ge=1, le=LARGEST),
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": LARGEST},
                {"type": "string", "pattern": f"^{SIZE.pattern}$"},
            ]
        },
        mode="validation",
    ),
]


class Target(Frozen):
    """What the compressed model may be at most; the sparsity follows from it. Exactly one field is given."""

    parameters: Annotated[
        int | None,
        Field(strict=True, ge=1, le=LARGEST, description="of the whole model at most: embeddings and head included"),
    ] = None
    bytes: Annotated[
        Bytes | None,
        Field(
            description="of the safetensors files at most, embeddings, head and headers included: a number, or text "
            "such as '8 GB' (decimal) or '90 MiB' (binary)"
        ),
    ] = None

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if len(self._given()) != 1:
            raise ValueError("target needs exactly one of parameters and bytes")
        return self

    def _given(self) -> tuple[Goal, ...]:
        """The goals that are given."""
        names: tuple[Goal, ...] = ("parameters", "bytes")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def goal(self) -> Goal:
        """Which field is given."""
        return self._given()[0]

    @property
    def limit(self) -> int:
        """Its value, in parameters or bytes."""
        value: int = getattr(self, self.goal)
        return value
