"""A table in a chat message, in the shape that TableGPT2's clients send."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from api_schemas.base import Frozen

Cell = str | bool | Annotated[int, Field(ge=-(2**63), lt=2**64)] | float | None


class TableColumn(Frozen):
    """One column. `contains_nan` and `is_unique` are taken from clients that send them, and counted here anyway."""

    name: Annotated[str, Field(max_length=1024)]
    dtype: Annotated[str, Field(min_length=1, max_length=64, description="as pandas says it: int64, float64, object …")]
    values: Annotated[list[Cell], Field(min_length=1, max_length=10_000, description="null is a missing value")]
    contains_nan: bool | None = None
    is_unique: bool | None = None


class Table(Frozen):
    """A table by columns."""

    columns: Annotated[list[TableColumn], Field(min_length=1, max_length=1_000)]
    name: Annotated[
        str | None,
        Field(max_length=256, description="of the dataframe: with it the model's own words are put around the table"),
    ] = None

    @model_validator(mode="after")
    def _as_long_as_each_other(self) -> Self:
        first = self.columns[0]
        for column in self.columns:
            if len(column.values) != len(first.values):
                raise ValueError(
                    f"column {column.name!r} has {len(column.values)} values and {first.name!r} has "
                    f"{len(first.values)}; give every column one value per row"
                )
        return self


class TablePart(Frozen):
    """A table part of a message. Models without a rule for tables refuse it with a 400 that says so."""

    type: Literal["table"]
    table: Table
