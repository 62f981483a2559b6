"""Writes down who changed what, and who was refused to: one line per request that is no mere look."""

import logging

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from job_store.audit import AuditLog
from service.permissions import Caller

log = logging.getLogger("modepress.service")
LOOKS = ("GET", "HEAD", "OPTIONS")
# Parts belong to an upload that has its line; plans change nothing; chats are counted as tokens.
PASSED_OVER = ("/parts", "/v1/compression/plans", "/v1/chat/completions", "/v1/completions")


class Auditing:
    """Adds a line to the audit log when a request is over. Callers whom nobody knows leave none: they could fill it."""

    def __init__(self, app: ASGIApp, audit: AuditLog) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request and note it."""
        if scope["type"] != "http" or scope["method"] in LOOKS or scope["path"].endswith(PASSED_OVER):
            await self._app(scope, receive, send)
            return
        status, location = 500, b""

        async def watched(message: Message) -> None:
            nonlocal status, location
            if message["type"] == "http.response.start":
                status = message["status"]
                location = dict(message["headers"]).get(b"location", b"")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            caller: Caller | None = scope.get("state", {}).get("caller")
            if caller is not None:
                made = location.decode().rpartition("/")[2]
                await run_in_threadpool(self._note, scope, caller, status, made)

    def _note(self, scope: Scope, caller: Caller, status: int, made: str) -> None:
        client = scope.get("client")
        named = "/".join(str(value) for value in scope.get("path_params", {}).values())
        try:
            self._audit.record(
                caller.name,
                caller.owner,
                f"{scope['method']} {getattr(scope.get('route'), 'path', scope['path'])}"[:128].replace("\0", ""),
                target=made or named or None,
                status=status,
                address=client[0] if client else None,
                request_id=scope["state"].get("request_id"),
            )
        except SQLAlchemyError as error:  # what was done is done; the log of the process has it at least
            log.error("not in the audit log (%s): %s %s", type(error).__name__, caller.name, scope["path"][:200])
