"""Reads text: whole files, JSONL rows, hub rows and Python's own prose."""

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

from api_schemas.calibration import TextSource
from api_schemas.errors import InvalidCalibration

MAX_TEXT_BYTES = 16 * 1024**2  # a whole text is tokenised at once: this keeps it below a gigabyte of memory
MAX_ROW_BYTES = 16 * 1024**2
JSONL_SUFFIXES = (".jsonl", ".ndjson")
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")

Role = Literal["calibration", "evaluation"]


def is_jsonl(path: Path) -> bool:
    """Whether a file holds rows: by its name, or, where a stored upload has no suffix, by its first line."""
    if path.suffix:
        return path.suffix.lower() in JSONL_SUFFIXES
    with path.open("rb") as file:
        first = file.readline(MAX_ROW_BYTES).strip()
    try:
        return first.startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def whole_text(path: Path, param: str) -> str:
    """Return the text of a file; line ends of any system become "\\n", as in every reader's text mode.

    Raises:
        InvalidCalibration: `text_too_large` or `not_text`.
    """
    with path.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise InvalidCalibration(
            "text_too_large",
            f"{param}: the text is larger than {MAX_TEXT_BYTES} bytes; cut it, or give JSONL, whose rows are "
            "read one by one",
            param,
        )
    return decode(data, f"{param}: the text", param).replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, what: str, param: str) -> str:
    """Decode UTF-8 text, or raise InvalidCalibration `not_text`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidCalibration("not_text", f"{what} is not UTF-8 (byte {error.start}); convert it", param) from error
    if "\0" in text:
        raise InvalidCalibration("not_text", f"{what} holds NUL characters; it is a binary file", param)
    return text


def jsonl_rows(path: Path, field: str, tokenizer: Any, param: str) -> Iterator[str]:
    """Yield the text of each row, one line in memory at a time; blank lines count for nothing.

    Raises:
        InvalidCalibration: `bad_row` with the line's number, `not_text`, or `no_chat_template`.
    """
    for where, row in jsonl_values(path, param):
        yield row_text(row, field, tokenizer, where, param)


def jsonl_values(path: Path, param: str) -> Iterator[tuple[str, Any]]:
    """Yield each line's value with words that say where it stands; blank lines count for nothing.

    Raises:
        InvalidCalibration: `bad_row` with the line's number, or `not_text`.
    """
    with path.open("rb") as file:
        for number in range(1, 2**63):
            line = file.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            where = f"{param}: line {number}"
            if len(line) > MAX_ROW_BYTES:
                raise InvalidCalibration("bad_row", f"{where} is longer than {MAX_ROW_BYTES} bytes; split it", param)
            text = decode(line, where, param)
            if text.strip():
                yield where, _parse_row(text, where, param)


def _parse_row(line: str, where: str, param: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidCalibration("bad_row", f"{where} is not JSON ({error}); one object per line", param) from error


def row_text(row: Any, field: str, tokenizer: Any, where: str, param: str) -> str:
    """The text of a row: its text field, or its `messages` as the chat template writes them."""
    if isinstance(row, Mapping) and isinstance(row.get(field), str):
        return decode(row[field].encode("utf-8", "surrogatepass"), where, param)
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not _are_messages(messages):
        raise InvalidCalibration(
            "bad_row", f"{where} has neither a text in {field!r} nor 'messages' with role and content; mend it", param
        )
    if not tokenizer.chat_template:
        raise InvalidCalibration(
            "no_chat_template", f"{where} is a chat, but the model's tokenizer has no chat template; give text", param
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise InvalidCalibration("bad_row", f"{where} does not suit the chat template ({error})", param) from error


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, Mapping) and isinstance(message.get(key), str)
            for message in value
            for key in ("role", "content")
        )
    )


def hub_rows(source: TextSource, tokenizer: Any, offline: bool, param: str) -> Iterator[str]:
    """Yield the text of a hub data set's rows, downloaded as they are needed.

    Raises:
        InvalidCalibration: `hub_unavailable` (offline, `datasets` not installed, unknown data set, no network),
            `bad_dataset_name`, `bad_row`.
    """
    name = source.dataset or ""
    if not HUB_NAME.fullmatch(name) or Path(name).exists():  # the library would take a path for a local folder
        raise InvalidCalibration("bad_dataset_name", f"{param}.dataset {name!r} is not 'name' or 'owner/name'", param)
    if offline:
        raise _no_hub(name, "this worker is offline", param)
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise _no_hub(name, "the package 'datasets' is not installed on this worker", param) from error
    try:
        rows = iter(library.load_dataset(name, source.subset, split=source.split, streaming=True))
    except Exception as error:  # the library has no common base of its errors
        raise _no_hub(name, f"{type(error).__name__}: {error}", param) from error
    for number in range(1, 2**63):
        try:
            row = next(rows, None)
        except Exception as error:
            raise _no_hub(name, f"row {number}: {type(error).__name__}: {error}", param) from error
        if row is None:
            return
        yield row_text(row, source.text_field, tokenizer, f"{param}: row {number}", param)


def _no_hub(name: str, why: str, param: str) -> InvalidCalibration:
    return InvalidCalibration(
        "hub_unavailable", f"{param}.dataset {name!r}: {why}; upload the text, or use source 'builtin'", param
    )


def builtin_text(role: Role) -> str:
    """Python's language reference: every second topic calibrates, the others evaluate.

    Some topics quote others, so paragraphs of the calibration half are taken out of the evaluation half.
    """
    names = sorted(topics)
    ours, theirs = (names[::2], names[1::2]) if role == "calibration" else (names[1::2], names[::2])
    if role == "calibration":
        return "\n\n".join(topics[name] for name in ours)
    taken = {paragraph.strip() for name in theirs for paragraph in topics[name].split("\n\n")}
    kept = (paragraph for name in ours for paragraph in topics[name].split("\n\n") if paragraph.strip() not in taken)
    return "\n\n".join(kept)


def text_sha256(parts: list[str]) -> str:
    """Fingerprint of texts in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
