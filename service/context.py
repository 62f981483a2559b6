"""Around every request: its id, its time, its count, and an answer even when our own code breaks."""

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_schemas.errors import ErrorBody
from job_store.json_logs import about
from service.errors import render
from service.metrics import Metrics

log = logging.getLogger("modepress.service")
REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")
CLIENT_CLOSED = 499  # nginx's number for a caller who left; nobody reads it but the metrics


class RequestContext:
    """The outermost middleware of ours."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request; an unexpected exception becomes a 500 that tells nothing of our insides."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.match(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
            await send(message)

        try:
            with about(request_id=request_id):
                await self._app(scope, receive, labelled)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        except Exception:
            log.exception("request %s %s failed: %s", scope["method"], scope["path"], request_id)
            if status:
                raise  # headers are out: only breaking the connection tells the client that the rest is missing
            await _broken(scope, request_id)(scope, receive, labelled)
        finally:
            self._count(scope, status, time.monotonic() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(scope["method"], route, str(status)).inc()
        self._metrics.seconds.labels(scope["method"], route).observe(seconds)


def _broken(scope: Scope, request_id: str) -> ASGIApp:
    message = f"the server failed on this request; its log says why under request id {request_id}"
    body = ErrorBody(message=message, type="server_error", param=None, code="internal_error")
    return render(Request(scope), 500, body)
