"""A multipart body streamed to disk in constant memory: one file field, a few short text fields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api_schemas.errors import InvalidRequest
from job_store.landing import Landing
from job_store.settings import MIB

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

TEXT_BYTES = 1024
HEADER_BYTES = 8192
BATCH_BYTES = MIB  # handed to a thread at once: hashing and writing must not stop other requests


@dataclass
class Form:
    """What a multipart body held beside the bytes of its file."""

    filename: str = ""
    texts: dict[str, str] = field(default_factory=dict)


async def receive_form(request: Request, landing: Landing, file_field: str, text_fields: Sequence[str]) -> Form:
    """Stream a body into `landing` and return the rest of it.

    Raises:
        InvalidRequest: `invalid_multipart`, `missing_field`, `unknown_field`, `duplicate_field`.
        TooLarge, InsufficientStorage: from the landing.
    """
    reader = _Reader(landing, file_field, text_fields)
    parser = MultipartParser(_boundary(request), reader.callbacks())
    batch = bytearray()
    try:
        async for chunk in request.stream():
            batch += chunk
            if len(batch) >= BATCH_BYTES:
                await run_in_threadpool(parser.write, bytes(batch))
                batch.clear()
        await run_in_threadpool(parser.write, bytes(batch))
    except MultipartParseError as error:
        raise _invalid(f"it cannot be parsed ({error})") from error
    if not reader.ended:
        raise _invalid("it ends before its closing boundary")
    if file_field not in reader.seen:
        raise InvalidRequest("missing_field", f"{file_field} is missing; send it as a file field", file_field)
    return reader.form


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        raise _invalid("content-type must be multipart/form-data with a boundary")
    return boundary


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest("invalid_multipart", f"the body is no multipart form: {reason}; send one")


class _Reader:
    """Callbacks of the parser: file bytes go to the landing, texts and headers into small buffers."""

    def __init__(self, landing: Landing, file_field: str, text_fields: Sequence[str]) -> None:
        self._landing = landing
        self._file_field = file_field
        self._text_fields = text_fields
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value, self._text = bytearray(), bytearray(), bytearray()
        self._field = ""
        self.form = Form()
        self.seen: set[str] = set()
        self.ended = False

    def callbacks(self) -> "MultipartCallbacks":
        """Return what the parser calls."""
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._grow(self._name, data[start:end]),
            "on_header_value": lambda data, start, end: self._grow(self._value, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_field,
            "on_part_data": self._take,
            "on_part_end": self._close_field,
            "on_end": self._end,
        }

    def _grow(self, buffer: bytearray, data: bytes) -> None:
        buffer += data
        if len(buffer) > HEADER_BYTES:
            raise _invalid(f"a part header exceeds {HEADER_BYTES} bytes")

    def _end_header(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _open_field(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if name != self._file_field and name not in self._text_fields:
            known = ", ".join((self._file_field, *self._text_fields))
            raise InvalidRequest("unknown_field", f"{name!r} is not a field of this form ({known}); remove it", name)
        if name in self.seen:
            raise InvalidRequest("duplicate_field", f"{name} appears twice; send it once", name)
        self.seen.add(name)
        if name == self._file_field:
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._field == self._file_field:
            self._landing.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > TEXT_BYTES:
            raise InvalidRequest("invalid_value", f"{self._field} exceeds {TEXT_BYTES} bytes; shorten it", self._field)

    def _close_field(self) -> None:
        if self._field != self._file_field:
            self.form.texts[self._field] = self._text.decode("utf-8", "replace")
            self._text.clear()

    def _end(self) -> None:
        self.ended = True
