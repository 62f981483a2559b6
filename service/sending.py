"""Files out of the store: whole or one range of them, in pieces, whatever their size."""

import re
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api_schemas.errors import ErrorBody
from job_store.files import OpenedFile
from service.errors import render

PIECE_BYTES = 256 * 1024
ONE_RANGE = re.compile(r"bytes=(?:(\d{1,19})-(\d{0,19})|-(\d{1,19}))")


def send_file(request: Request, file: OpenedFile, path: str) -> Response:
    """Answer with a file's bytes.

    Knows one range (`bytes=a-b`, `a-`, `-n`), `If-Range` and `If-None-Match`. A range it does not know, and several at
    once, are answered with the whole file, as RFC 9110 (14.2) allows.
    """
    tag = f'"{file.tag}"'
    headers = {"etag": tag, "accept-ranges": "bytes"}
    if _names(request.headers.get("if-none-match"), tag):
        file.handle.close()
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, file.bytes, 200
    asked = ONE_RANGE.fullmatch(request.headers.get("range", "").strip())
    if asked is not None and request.headers.get("if-range", tag) == tag:
        start, stop = _bounds(asked, file.bytes)
        if start >= stop:
            file.handle.close()
            return _unsatisfiable(request, path, file.bytes)
        status, headers["content-range"] = 206, f"bytes {start}-{stop - 1}/{file.bytes}"
    headers["content-length"] = str(stop - start)
    headers["content-disposition"] = f"attachment; filename*=utf-8''{quote(path.rsplit('/', 1)[-1])}"
    return _SentFile(file.handle, start, stop - start, status, headers)


def _names(header: str | None, tag: str) -> bool:
    tags = [one.strip().removeprefix("W/") for one in (header or "").split(",")]
    return tag in tags or tags == ["*"]


def _bounds(asked: re.Match[str], size: int) -> tuple[int, int]:
    """First byte, and the one behind the last; an empty range when there is nothing to send."""
    first, last, suffix = asked.groups()
    if suffix is not None:
        return max(0, size - int(suffix)), size
    return int(first), min(int(last) + 1, size) if last else size


def _unsatisfiable(request: Request, path: str, size: int) -> Response:
    message = f"Range {request.headers['range']!r} has nothing of {path!r}, which holds {size} bytes; ask for less"
    body = ErrorBody(message=message, type="invalid_request_error", param="Range", code="range_not_satisfiable")
    return render(request, 416, body, {"content-range": f"bytes */{size}"})


class _SentFile(StreamingResponse):
    """Sends from an open file and closes it, also when the caller leaves in the middle."""

    def __init__(self, handle: BinaryIO, start: int, length: int, status: int, headers: dict[str, str]) -> None:
        handle.seek(start)
        super().__init__(_pieces(handle, length), status, headers, media_type="application/octet-stream")
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._handle:
            if scope["method"] == "HEAD":
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b""})
            else:
                await super().__call__(scope, receive, send)


def _pieces(handle: BinaryIO, length: int) -> Iterator[bytes]:
    """The next `length` bytes. A file that has become shorter breaks the connection: nobody takes it for whole."""
    while length:
        piece = handle.read(min(PIECE_BYTES, length))
        if not piece:
            raise RuntimeError(f"{handle.name} has lost its last {length} bytes while it was sent")
        length -= len(piece)
        yield piece
