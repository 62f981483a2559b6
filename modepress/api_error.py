"""What the client raises: the server's own words, or that there is no server."""

import httpx
from pydantic import ValidationError

from api_schemas.errors import ErrorBody, ErrorResponse


class ModepressApiError(Exception):
    """The server refused or failed.

    Attributes:
        status: HTTP status; 0 when no server answered.
        code: stable name of the error, e.g. `invalid_checkpoint`.
        message: the server's message, naming field, value and remedy.
        param: dotted path of the offending field, or None.
        type: OpenAI's kind of error, e.g. `invalid_request_error`.
    """

    def __init__(self, status: int, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.status = status
        self.code = body.code
        self.message = body.message
        self.param = body.param
        self.type = body.type

    def body(self) -> ErrorBody:
        """Return the four-key object, as the server sends it."""
        return ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code)


class Unreachable(ModepressApiError):
    """No server answered at the address."""

    def __init__(self, url: str, reason: str) -> None:
        message = f"no Modepress server answers at {url} ({reason}); start one with `modepress up` or set MODEPRESS_URL"
        super().__init__(0, ErrorBody(message=message, type="connection_error", param=None, code="unreachable"))


def raise_for(response: httpx.Response) -> None:
    """Raise ModepressApiError when the (fully read) response is not a success."""
    if response.is_success:
        return
    try:
        body = ErrorResponse.model_validate_json(response.content, extra="ignore").error
    except ValidationError:
        text = response.text.strip()[:200] or "no body"
        message = f"the server answered {response.status_code} without an error object: {text}"
        body = ErrorBody(message=message, type="server_error", param=None, code="unexpected_answer")
    raise ModepressApiError(response.status_code, body)
