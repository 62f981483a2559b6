"""A table of a request with its columns in the types that their dtypes name, as the authors' pandas would hold them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from api_schemas.errors import InvalidRequest
from api_schemas.table_parts import Table, TableColumn

Kind = Literal["int", "float", "bool", "text"]
NUMBERS = ("int", "float")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: as the request spells it.
        dtype: as the request spells it.
        kind: of its values.
        values: `int`, `float` (missing is NaN), `bool`, or `str` and None where a value is missing.
    """

    name: str
    dtype: str
    kind: Kind
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Frame:
    """A table.

    Attributes:
        place: where it stands in the request.
        name: of the dataframe, or None.
        columns: at least one, equally long, not empty.
    """

    place: str
    name: str | None
    columns: tuple[Column, ...]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.columns[0].values)

    def head(self, rows: int) -> "Frame":
        """The first rows alone."""
        short = (Column(one.name, one.dtype, one.kind, one.values[:rows]) for one in self.columns)
        return Frame(self.place, self.name, tuple(short))


def read_frame(table: Table, place: str) -> Frame:
    """Return a request's table.

    Raises:
        InvalidRequest: `table_value_mismatch`: a value is not of its column's dtype; the message names column and row.
    """
    columns = (_column(column, f"{place}.table.columns.{index}") for index, column in enumerate(table.columns))
    return Frame(place, table.name, tuple(columns))


def cell_texts(frame: Frame, most_rows: int) -> list[list[str]]:
    """Return a table's cells as text by row and column, as the authors' encoder reads them.

    Missing numbers are their column's mean (0 where all are missing). A table of numbers alone is one array: whole
    numbers get a decimal point where any column has one. Of more than `most_rows` rows, as many are taken at equal
    steps from the first on, where the authors draw them at random: the same table always reads the same.
    """
    columns = as_one_array(Frame(frame.place, frame.name, tuple(_filled(column) for column in frame.columns))).columns
    steps = min(frame.rows, most_rows)
    taken = [index * frame.rows // steps for index in range(steps)]
    return [[_said(column.values[row]) for column in columns] for row in taken]


def as_one_array(frame: Frame) -> Frame:
    """Give columns the one type that an array of them all would have: numbers among themselves become floats."""
    kinds = {column.kind for column in frame.columns}
    if "float" not in kinds or not kinds <= set(NUMBERS):
        return frame
    made = (Column(one.name, one.dtype, "float", tuple(map(float, one.values))) for one in frame.columns)
    return Frame(frame.place, frame.name, tuple(made))


def _column(column: TableColumn, place: str) -> Column:
    kind = _kind(column.dtype)
    missing = None in column.values
    if kind == "int" and missing:
        kind = "float"
    if kind == "bool" and missing:
        kind = "text"
    values = [_value(value, kind, f"{place}.values.{row}", column) for row, value in enumerate(column.values)]
    return Column(column.name, column.dtype, kind, tuple(values))


def _kind(dtype: str) -> Kind:
    name = dtype.lower()
    if name.startswith(("int", "uint")) and not name.startswith("interval"):
        return "int"
    return "float" if name.startswith("float") else "bool" if name.startswith("bool") else "text"


def _value(value: Any, kind: Kind, place: str, column: TableColumn) -> Any:
    if kind == "text":
        return None if value is None else str(value)
    if kind == "bool":
        fits = isinstance(value, bool)
    elif kind == "int":
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if not fits:
        shown = repr(value)[:80]
        message = (
            f"{place} is {shown}, and column {column.name!r} has dtype {column.dtype!r}; correct the value or dtype"
        )
        raise InvalidRequest("table_value_mismatch", message, place)
    if kind == "float":
        return math.nan if value is None else float(value)
    return value


def _filled(column: Column) -> Column:
    if column.kind != "float":
        return column
    values = np.asarray(column.values, dtype=np.float64)
    absent = np.isnan(values)
    if absent.any():
        known = int((~absent).sum())
        mean = float(np.where(absent, 0.0, values).sum()) / known if known else 0.0
        values = np.where(absent, mean, values)
    return Column(column.name, column.dtype, "float", tuple(float(value) for value in values))


def _said(value: Any) -> str:
    return "nan" if value is None else str(value)
