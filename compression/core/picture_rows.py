"""Reads image-text pairs: rows of a JSONL file with an image by path or by bytes, decoded within limits."""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from api_schemas.calibration import Calibration
from api_schemas.errors import InvalidCalibration, InvalidRequest
from compression.core.image_decoding import decode
from compression.core.text_rows import Role, is_jsonl, jsonl_values, row_text
from preflight.text_paths import resolve_text_path

MAX_IMAGE_BYTES = 32 * 1024**2
MAX_IMAGE_PIXELS = 64 * 1024**2  # 192 MB in memory as red, green and blue
ROLE: Role = "calibration"


@dataclass(frozen=True)
class PictureRow:
    """One row.

    Attributes:
        text: of the row.
        image: red, green and blue; None in a row of text alone.
        digest: SHA-256 of the image's file.
        where: words that name the row in errors.
    """

    text: str
    image: Image.Image | None
    digest: str
    where: str


def picture_rows(path: Path, source: Calibration, tokenizer: Any, roots: Sequence[Path] | None) -> Iterator[PictureRow]:
    """Yield rows one at a time; a row without an image is one of text.

    Args:
        path: a JSONL file.
        source: which keys hold text and image; images of an upload come as bytes, never by path.
        tokenizer: for rows that are chats.
        roots: folders that image files must lie under; None allows any.

    Raises:
        InvalidCalibration: `images_need_rows` for a plain text, `bad_row`, `bad_image`, `image_too_large`,
            `image_path_refused`, and the codes of `resolve_text_path`.
    """
    if not is_jsonl(path):
        raise InvalidCalibration(
            "images_need_rows",
            f"calibration.image_field {source.image_field!r}: {path.name} is a plain text; give JSONL, one object with "
            f"{source.text_field!r} and {source.image_field!r} a line",
            "calibration.image_field",
        )
    for where, row in jsonl_values(path, ROLE):
        text = row_text(row, source.text_field, tokenizer, where, ROLE)
        given = row.get(source.image_field) if isinstance(row, Mapping) else None
        if given is None:
            yield PictureRow(text, None, "", where)
        else:
            data = _bytes_of(given, path, source, roots, where)
            yield PictureRow(text, _decoded(data, where), hashlib.sha256(data).hexdigest(), where)


def _bytes_of(given: Any, rows: Path, source: Calibration, roots: Sequence[Path] | None, where: str) -> bytes:
    """The bytes of an image's file, from the row itself or from a file beside it."""
    if isinstance(given, Mapping) and isinstance(given.get("bytes"), str):
        try:
            return base64.b64decode(given["bytes"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _bad(where, f"'bytes' are not base64 ({error})") from error
    name = given.get("path") if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        raise _bad(where, f"{source.image_field!r} is neither a path nor an object with 'path' or 'bytes'")
    if source.source != "file":
        raise InvalidCalibration(
            "image_path_refused", f"{where}: an upload's rows cannot name files; give {{'bytes': base64}}", ROLE
        )
    file = resolve_text_path(str(rows.parent / name), roots, f"{where}, {source.image_field}")
    with file.open("rb") as opened:
        data = opened.read(MAX_IMAGE_BYTES + 1)
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidCalibration("image_too_large", f"{where}: {name} is larger than {MAX_IMAGE_BYTES} bytes", ROLE)
    return data


def _decoded(data: bytes, where: str) -> Image.Image:
    try:
        return decode(data, MAX_IMAGE_PIXELS)
    except InvalidRequest as error:
        code = "image_too_large" if error.code == "image_too_many_pixels" else "bad_image"
        raise InvalidCalibration(code, f"{where}: {error.message}; mend the row or leave it out", ROLE) from error


def _bad(where: str, why: str) -> InvalidCalibration:
    return InvalidCalibration("bad_image", f"{where}: {why}; mend the row or leave it out", ROLE)
