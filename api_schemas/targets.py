"""A goal instead of a sparsity: how large the compressed model may be, or how much worse."""

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
Goal = Literal["parameters", "bytes", "perplexity_increase"]
GOALS: tuple[Goal, ...] = ("parameters", "bytes", "perplexity_increase")
DEFAULT_TRIALS = 5


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

    perplexity_increase: Annotated[
        float | None,
        Field(
            gt=0.0,
            le=100.0,
            description="relative, at most: 0.1 looks for the smallest model whose perplexity rises by no more than a "
            "tenth, measured on windows of the calibration text that the model is not calibrated on",
        ),
    ] = None
    trials: Annotated[
        int | None,
        Field(
            ge=1,
            le=32,
            description=f"perplexity_increase: compressions that are tried at most; null takes {DEFAULT_TRIALS}",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if len(self._given()) != 1:
            raise ValueError(f"target needs exactly one of {', '.join(GOALS)}")
        if self.trials is not None and self.perplexity_increase is None:
            raise ValueError(f"trials {self.trials} belongs to perplexity_increase; a size is counted out, not tried")
        return self

    def _given(self) -> tuple[Goal, ...]:
        return tuple(name for name in GOALS if getattr(self, name) is not None)

    @property
    def goal(self) -> Goal:
        """Which field is given."""
        return self._given()[0]

    @property
    def limit(self) -> int:
        """The largest size, in parameters or bytes.

        Raises:
            ValueError: the goal is a loss of quality.
        """
        size = self.parameters or self.bytes
        if size is None:
            raise ValueError(f"goal {self.goal} is no size")
        return size

    @property
    def most_trials(self) -> int:
        """Compressions that may be tried; 0 where the sparsity is counted out."""
        return 0 if self.perplexity_increase is None else self.trials or DEFAULT_TRIALS
