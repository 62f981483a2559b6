"""What the command line shows: tables for people, JSON for scripts. Machine output alone goes to stdout."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.table import Table

from api_schemas.plans import ModelPart

Form = Callable[[float], str]

UNFOLDED = 1000

err = Console(stderr=True, highlight=False)


def plain(value: Any) -> Any:
    """Turn schemas inside a value into JSON's own types."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_json(value: Any) -> None:
    """Write one JSON document on one line to stdout."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def console() -> Console:
    """Stdout for people. Made at each call: its width is the terminal's now; into a pipe or file nothing is folded."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=UNFOLDED)


def show(value: Any, *, as_json: bool, human: Callable[[], RenderableType]) -> None:
    """Write a value as JSON, or what `human` makes of it."""
    if as_json:
        write_json(value)
    else:
        shown = human()
        console().print(shown, soft_wrap=isinstance(shown, str), markup=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    """Lay rows out; columns that begin with '>' are numbers and stand to the right."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        # The first names the thing and is copied from the screen: it stays whole.
        grid.add_column(column.removeprefix(">"), justify=side, overflow="fold", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*row)
    return grid


def count(number: float) -> str:
    """12345678 as 12.35 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes with a decimal unit: 270.9 MB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} B"


def parts(of: Sequence[ModelPart]) -> list[str]:
    """The parts of a model that has several, on one line; none otherwise."""
    if not of:
        return []
    sizes = ", ".join(f"{part.name} {count(part.parameters)} parameters" for part in of)
    return [f"parts: {sizes}; the language part alone can change"]


def seconds(number: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(number)
    if whole < 60:
        return f"{number:.1f} s" if number < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
