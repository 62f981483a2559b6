"""How large a request body may be, counted while it streams in, whatever its headers claim."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_schemas.errors import TooLarge
from job_store.settings import MIB, Settings
from service.errors import BodyTooLarge

PART = re.compile(r"^/v1/uploads/[^/]+/parts/?$")
FILE = re.compile(r"^/v1/files/?$")
ENVELOPE_BYTES = MIB  # boundaries, headers and text fields of a multipart body


class BodyLimit:
    """Fails the reading of a body that is too large; nothing beyond the limit is kept."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request with a counted body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, error = self._limit(scope["path"])
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        total = int(declared) if declared.isdigit() else 0
        received = 0

        async def counted() -> Message:
            nonlocal received
            if total > limit:
                raise BodyTooLarge(error)
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise BodyTooLarge(error)
            return message

        await self._app(scope, counted, send)

    def _limit(self, path: str) -> tuple[int, TooLarge]:
        settings = self._settings
        if PART.match(path):
            message = f"a part may hold {settings.max_part_bytes} bytes; send the rest as further parts"
            return settings.max_part_bytes + ENVELOPE_BYTES, TooLarge("part_too_large", message, "data")
        if FILE.match(path):
            message = f"file may hold {settings.max_file_bytes} bytes; send larger ones through POST /v1/uploads"
            return settings.max_file_bytes + ENVELOPE_BYTES, TooLarge("file_too_large", message, "file")
        message = f"the body may hold {settings.max_body_bytes} bytes; send files through POST /v1/uploads"
        return settings.max_body_bytes, TooLarge("body_too_large", message)
