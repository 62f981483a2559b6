"""From a conversation with tables to what a model reads, by the model's own rule.

The words around a table are those of the authors' prompts. They are written where the request names the dataframe;
without a name the table alone is written, since clients that follow the authors bring the words themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from api_schemas.errors import InvalidRequest
from api_schemas.inference import Message, TextPart
from api_schemas.table_parts import TablePart
from preflight.tables import CELLS, TEXT, TableRule
from workers.inference.tables.frames import Frame, cell_texts, read_frame
from workers.inference.tables.printing import to_markdown, to_string
from workers.inference.tables.reading import TableReader

TABLE_TOKEN_ID = -114  # as in `compression.runtime.tablegpt2`: no token, a position that a table fills


def table_places(messages: Sequence[Message]) -> list[str]:
    """Return where in a request each table stands, in order."""
    return [
        f"messages.{index}.content.{position}"
        for index, message in enumerate(messages)
        if not isinstance(message.content, str)
        for position, part in enumerate(message.content)
        if isinstance(part, TablePart)
    ]


def write_tables(rule: TableRule, messages: Sequence[Message]) -> tuple[list[Message], list[Frame]]:
    """Return the conversation with every table in words, and the tables in their order.

    Raises:
        InvalidRequest: `table_value_mismatch`, or `table_too_wide`: more columns than the model takes.
    """
    frames: list[Frame] = []
    written = []
    for index, message in enumerate(messages):
        if isinstance(message.content, str) or not any(isinstance(part, TablePart) for part in message.content):
            written.append(message)
            continue
        parts: list[Any] = []
        for position, part in enumerate(message.content):
            if isinstance(part, TablePart):
                frames.append(_frame(rule, part, f"messages.{index}.content.{position}"))
                part = TextPart(type="text", text=_words(rule, frames[-1]))
            if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
                part = TextPart(type="text", text=_joined(parts.pop().text, part.text))
            parts.append(part)
        written.append(message.model_copy(update={"content": parts}))
    return written, frames


def table_inputs(
    reader: TableReader, tokenizer: Any, text: str, frames: Sequence[Frame]
) -> tuple[list[int], dict[str, Tensor]]:
    """Return the prompt's tokens, with places for tables, and what the model's forward takes beside them.

    Args:
        reader: of a model with a table encoder.
        tokenizer: of its decoder.
        text: the rendered conversation.
        frames: its tables, in the order in which they are written.

    Raises:
        InvalidRequest: `table_mark_in_text`: the text has more marks, or fewer, than the tables have places.
    """
    rule = reader.rule
    encoded = [_encoded(reader, frame) for frame in frames]
    positions = [count for frame, rows in zip(frames, encoded, strict=True) for count in _positions(rule, frame, rows)]
    pieces = text.split(rule.place)
    if len(pieces) - 1 != len(positions):
        message = (
            f"the conversation has {len(pieces) - 1} times {rule.place!r}, which stands for tables in this model's "
            f"prompts, and its tables have {len(positions)} places; spell it otherwise, or use another template"
        )
        raise InvalidRequest("table_mark_in_text", message, "messages")
    prompt: list[int] = []
    for piece, count in zip(pieces, [*positions, 0], strict=True):
        prompt += [*tokenizer(piece, add_special_tokens=False)["input_ids"], *[TABLE_TOKEN_ID] * count]
    return prompt, _tensors(rule, frames, encoded) if frames else {}


def _frame(rule: TableRule, part: TablePart, place: str) -> Frame:
    columns = len(part.table.columns)
    if rule.columns is not None and columns > rule.columns:
        message = f"{place} has {columns} columns, and this model reads at most {rule.columns}; leave some out"
        raise InvalidRequest("table_too_wide", message, f"{place}.table.columns")
    return read_frame(part.table, place)


def _words(rule: TableRule, frame: Frame) -> str:
    """A table as the authors' prompts have it; see the module's text about names."""
    name = frame.name
    if rule.rule == TEXT:
        rows = to_string(frame.head(rule.rows), index=False)
        about = f'"{name}.head({rule.rows}).to_string(index=False)" as follows:'
        return rows if name is None else f"/*\n{about}\n{rows}\n*/"
    if rule.rule == CELLS:
        mark = f"{rule.around}{rule.place}{rule.around}"
        lines = "\n".join(f"- {mark} '{column.name}' {column.dtype}" for column in frame.columns)
        about = f"Details about the '{name}' dataframe that can be used as follows:"
        return lines if name is None else f"/*\n{about}\n{lines}\n*/"
    shown = f"{to_string(frame.head(rule.rows), index=True)}\n{rule.place}"
    return shown if name is None else f"/* Details about the '{name}' dataframe:\n{shown}\n*/"


def _joined(before: str, after: str) -> str:
    return before + after if before.endswith("\n") else f"{before}\n{after}"


def _encoded(reader: TableReader, frame: Frame) -> list[list[int]]:
    """Token ids of each cell, row after row, or of the whole table."""
    if reader.rule.rule == CELLS:
        texts = [cell for row in cell_texts(frame, reader.rule.rows) for cell in row]
    else:
        texts = [to_markdown(frame)]
    return [list(one.ids) for one in reader.tokenizer.encode_batch(texts)]


def _positions(rule: TableRule, frame: Frame, encoded: Sequence[Sequence[int]]) -> list[int]:
    """How many positions of the decoder each mark of a table stands for."""
    return [rule.positions] * len(frame.columns) if rule.rule == CELLS else [len(encoded[0])]


def _tensors(rule: TableRule, frames: Sequence[Frame], encoded: Sequence[list[list[int]]]) -> dict[str, Tensor]:
    texts = [text for table in encoded for text in table]
    longest = max(map(len, texts))
    cells, mask = torch.zeros(2, len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        cells[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        mask[row, : len(text)] = 1
    sizes = [[min(frame.rows, rule.rows), len(frame.columns)] for frame in frames]
    return {"table_cells": cells, "table_mask": mask, "table_sizes": torch.tensor(sizes)}
