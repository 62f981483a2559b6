"""One place where everything that goes wrong becomes OpenAI's error object."""

import json
import logging
from collections.abc import Mapping
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api_schemas.errors import (
    ErrorBody,
    InsufficientStorage,
    ModepressError,
    TooLarge,
    TooManyRequests,
    Unavailable,
    place_of,
)

log = logging.getLogger("modepress.service")

SHOWN_CHARACTERS = 120  # of an offending value
READ_ERRORS = 1000
UNREADABLE = "There was an error parsing the body"  # what FastAPI says when the parser itself gives up
STATUS_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "route_not_found",
    405: "method_not_allowed",
    413: "body_too_large",
}
CODE_OF_TYPE = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "union_tag_not_found": "missing_field",
    "json_invalid": "invalid_json",
}


class BodyTooLarge(HTTPException):
    """Raised while a body is read; an HTTPException because the framework lets only those through there."""

    def __init__(self, error: TooLarge) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def install(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(ModepressError)
    async def named(request: Request, error: ModepressError) -> Response:
        return render_named(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        status, body = explain(error)
        return render(request, status, body)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        if isinstance(error, BodyTooLarge):
            return render(request, error.status_code, error.error.body())
        return render(request, error.status_code, _of_http(request, error), error.headers)

    @app.exception_handler(OperationalError)
    async def database(request: Request, error: OperationalError) -> Response:
        return render_database(request, error)


def render_named(request: Request, error: ModepressError) -> Response:
    """Return the answer to an error that names itself."""
    return render(request, error.status, error.body(), _headers_of(error))


def render_database(request: Request, error: OperationalError) -> Response:
    """Return the answer when the database is away; the log has what it said."""
    log.error("database: %s", error)
    if "full" in str(error.orig):  # SQLite: "database or disk is full"; PostgreSQL: DiskFull
        full = InsufficientStorage(
            "disk_full", "no space left for the database; free space on the server and try again"
        )
        return render_named(request, full)
    lost = Unavailable("database_unavailable", "the database does not answer; try again in a moment")
    return render_named(request, lost)


def render(request: Request, status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer in the form the client asked for: OpenAI's object, or RFC 9457 with that object inside."""
    answer: dict[str, Any] = {"error": body.model_dump()}
    media_type = "application/json"
    if "application/problem+json" in request.headers.get("accept", ""):
        media_type = "application/problem+json"
        answer = {
            "type": f"urn:modepress:error:{body.code}",
            "title": (body.code or body.type).replace("_", " "),
            "status": status,
            "detail": body.message,
            "instance": request.url.path,
            **answer,
        }
    return Response(json.dumps(answer), status_code=status, media_type=media_type, headers=dict(headers or {}))


def explain(error: RequestValidationError) -> tuple[int, ErrorBody]:
    """Return status and body for the deepest of the validation errors: unions list their shallow misfits too."""
    # A body of a million unknown keys has a million errors; the first thousand say as much.
    paths = [(_path(found, error.body), found) for found in error.errors()[:READ_ERRORS]]
    path, worst = max(paths, key=lambda pair: len(pair[0]))
    # A key may hold lone surrogates, which no string of a schema takes.
    param = ".".join(str(part) for part in path).encode("utf-8", "backslashreplace").decode() or None
    code = CODE_OF_TYPE.get(worst["type"], "invalid_value")
    if code == "invalid_json":
        position = worst["loc"][-1]
        reason = worst.get("ctx", {}).get("error", "it cannot be parsed")
        message = f"the body is not JSON: {reason} at character {position}; send valid JSON"
        return 400, ErrorBody(message=message, type="invalid_request_error", param=None, code=code)
    where = param or "the body"
    detail = str(worst["msg"]).removeprefix("Value error, ")
    if code == "missing_field":
        message = f"{where} is missing; add it"
    elif code == "unknown_field":
        message = f"{where} is not a field of this request (value {_shown(worst['input'])}); remove it"
    elif worst["type"] == "value_error":  # a sentence of our own, which names the values
        message = f"{where}: {detail}"
    else:
        message = f"{where}: {detail[:1].lower()}{detail[1:]}, not {_shown(worst['input'])}"
    others = len({other for other, _ in paths if other != path[: len(other)]})
    if others > 0:
        message += f" (and {others} more)"
    return 422, ErrorBody(message=message, type="invalid_request_error", param=param, code=code)


def _path(found: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    return place_of(found, body, skip=1) if found["loc"][:1] == ("body",) else tuple(found["loc"][1:])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _of_http(request: Request, error: HTTPException) -> ErrorBody:
    code = STATUS_CODES.get(error.status_code, "http_error")
    message = str(error.detail)
    kind = "invalid_request_error"
    if error.status_code == 400 and message == UNREADABLE:
        code = "invalid_json"
        message = "the body cannot be read: JSON nested too deeply, a number too long, or no text; send plainer JSON"
    elif error.status_code == 404:
        kind = "not_found_error"
        message = f"there is no route {request.method} {request.url.path}; GET /openapi.json lists them all"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        message = f"{request.url.path} does not take {request.method}; it takes {allowed}"
    return ErrorBody(message=message, type=kind, param=None, code=code)


def _headers_of(error: ModepressError) -> dict[str, str]:
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if isinstance(error, TooManyRequests):
        return {"retry-after": str(ceil(error.retry_after))}
    if error.status == 503:
        return {"retry-after": "5"}
    return {}
