"""How a model wants to be shown tables: a small file in its folder, written by the importer or by hand.

    {"rule": "text", "rows": 5}

`text`: the first rows as text, for any decoder. `cells` and `markup`: places in the prompt that a table encoder fills.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from api_schemas.base import Frozen
from api_schemas.errors import InvalidCheckpoint

RULE_FILE = "tables.json"
TOKENIZER_FILE = "table_tokenizer.json"  # of the table encoder
TEXT: Literal["text"] = "text"
CELLS: Literal["cells"] = "cells"
MARKUP: Literal["markup"] = "markup"


class TableRule(Frozen):
    """The content of `tables.json`."""

    rule: Literal["text", "cells", "markup"]
    rows: Annotated[int, Field(ge=1, le=100_000, description="most rows shown; `markup`: as text, beside all of them")]
    columns: Annotated[int | None, Field(ge=1, le=100_000, description="most columns; null: any number")] = None
    place: Annotated[str, Field(max_length=64, description="what stands for a table in the prompt's text")] = ""
    around: Annotated[str, Field(max_length=64, description="token before and after a place")] = ""
    tokens: Annotated[int, Field(ge=1, le=100_000, description="most tokens of a cell, or of a table as Markdown")] = 64
    positions: Annotated[int, Field(ge=1, le=64, description="of the decoder, for each column")] = 1


def has_rule(files: Sequence[str]) -> bool:
    """Whether a folder with these files says how tables are shown."""
    return RULE_FILE in files


def read_rule(folder: Path) -> TableRule | None:
    """Return a model's rule; None where it has none.

    Raises:
        InvalidCheckpoint: `invalid_table_rule`: the file is not as it must be.
    """
    path = folder / RULE_FILE
    if not path.is_file():
        return None
    try:
        rule = TableRule.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its JSON"
        message = f"{RULE_FILE} is wrong at {where}: {first['msg']}; correct or remove the file"
        raise InvalidCheckpoint("invalid_table_rule", message, RULE_FILE) from error
    if rule.rule != TEXT and not rule.place:
        message = f"{RULE_FILE}: rule {rule.rule!r} needs `place`, the text that stands for a table"
        raise InvalidCheckpoint("invalid_table_rule", message, RULE_FILE)
    return rule
