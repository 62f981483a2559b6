"""A table as text: what pandas' `to_string` and `to_markdown` print, which is how the authors' prompts show tables.

Without pandas; tests hold what pandas 3 printed.
"""

import math
from collections.abc import Sequence

from tabulate import tabulate

from workers.inference.tables.frames import Column, Frame, as_one_array

DIGITS = 6  # after the point; pandas' display.precision
LONG = DIGITS + 6  # a fixed form longer than this is given up for large numbers
LARGE = 1e6


def to_string(frame: Frame, *, index: bool) -> str:
    """Print rows in columns that are aligned on the right.

    Args:
        frame: the table.
        index: whether each row begins with its number.
    """
    printed = [_printed(column, " " if index else "") for column in frame.columns]
    if index:
        numbers = [str(row) for row in range(frame.rows)]
        width = max(map(len, numbers))
        printed.insert(0, ["".ljust(width), *[number.ljust(width) for number in numbers]])
    return "\n".join(" ".join(cells) for cells in zip(*printed, strict=True))


def to_markdown(frame: Frame) -> str:
    """Print a pipe table whose rows begin with their numbers; truth values among themselves are 0 and 1."""
    columns = as_one_array(frame).columns
    bits = all(column.kind == "bool" for column in columns)
    rows = [
        [
            row,
            *[
                "nan" if one.values[row] is None else int(one.values[row]) if bits else one.values[row]
                for one in columns
            ],
        ]
        for row in range(frame.rows)
    ]
    return str(tabulate(rows, headers=["", *[column.name for column in columns]], tablefmt="pipe"))


def _printed(column: Column, lead: str) -> list[str]:
    """Header and cells of one column, equally wide."""
    if column.kind == "float":
        cells = _floats(column.values, lead)
    elif column.kind == "int":
        cells = [_signed(str(value), lead) for value in column.values]
    else:
        cells = [lead + ("NaN" if value is None else str(value)) for value in column.values]
    header = column.name if column.kind == "text" else f" {column.name}"
    width = max(map(len, (header, *cells)))
    return [header.rjust(width), *[cell.rjust(width) for cell in cells]]


def _floats(values: Sequence[float], lead: str) -> list[str]:
    finite = [abs(value) for value in values if math.isfinite(value)]
    fixed = [_signed(text, lead) for text in _trimmed([_digits(value, "f") for value in values])]
    small = any(0 < value < 10**-DIGITS for value in finite)
    if small or (max(map(len, fixed)) > LONG and any(value > LARGE for value in finite)):
        return [_signed(_digits(value, "e"), lead) for value in values]
    return fixed


def _digits(value: float, form: str) -> str:
    if math.isnan(value):
        return "NaN"
    return f"{value:.{DIGITS}{form}}"


def _signed(text: str, lead: str) -> str:
    """A sign stands where the others have their lead."""
    return text if text.startswith("-") else lead + text


def _trimmed(texts: list[str]) -> list[str]:
    """Zeros that end every number go, but for one behind the point."""
    numbers = [text for text in texts if "." in text]
    spare = min([DIGITS - 1, *[len(text) - len(text.rstrip("0")) for text in numbers]])
    return [text[: len(text) - spare] if "." in text else text for text in texts]
