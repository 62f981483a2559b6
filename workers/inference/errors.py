"""Every error as OpenAI's four-key object."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api_schemas.errors import ErrorBody, ErrorResponse, ModepressError, place_of
from workers.inference.queueing import QueueFull

logger = logging.getLogger(__name__)


def error_body(error: BaseException) -> ErrorBody:
    """Return what a client sees of an error; of an unforeseen one, no more than that it happened."""
    if isinstance(error, ModepressError):
        return error.body()
    message = "the inference process failed on this request; its log says why"
    return ErrorBody(message=message, type="server_error", param=None, code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answer each kind of failure with `{"error": {message, type, param, code}}`."""
    app.add_exception_handler(ModepressError, _named)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _unforeseen)


def _answer(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(ErrorResponse(error=body).model_dump(), status_code=status, headers=headers)


def _named(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ModepressError):
        raise error
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull) else None
    return _answer(error.status, error.body(), headers)


def _invalid(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place = ".".join(str(part) for part in place_of(first, error.body, skip=1)) or None
    if first["type"] == "json_invalid":  # its place is an offset in the body, no field
        place = None
    code = "unknown_field" if first["type"] == "extra_forbidden" else "invalid_value"
    message = f"{place or 'the body'}: {first['msg']}"
    return _answer(400, ErrorBody(message=message, type="invalid_request_error", param=place, code=code))


def _no_route(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _answer(error.status_code, ErrorBody(message=message, type=kind, param=None, code=code))


def _unforeseen(_request: Request, error: Exception) -> JSONResponse:
    return _answer(500, error_body(error))  # Starlette logs the traceback
