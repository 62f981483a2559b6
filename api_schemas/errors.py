"""The one tree of errors, and the shape in which clients see them.

    ModepressError                 code, message, param; every error a user can cause
    ├── InvalidRequest             a value the user sent is wrong                     (HTTP 400/422)
    │   ├── InvalidCheckpoint      a model folder or file is corrupt or hostile
    │   ├── InvalidRecipe          a recipe cannot be carried out on this model
    │   └── InvalidCalibration     the calibration or evaluation text cannot serve
    ├── NotAuthenticated           no key, or a wrong one                             (HTTP 401)
    ├── NotPermitted               the key is known, the thing is not allowed         (HTTP 403)
    ├── NotFound                   no such object                                     (HTTP 404)
    ├── Conflict                   the object is in a state that forbids this         (HTTP 409)
    ├── TooLarge                   more bytes than this server takes                  (HTTP 413)
    ├── TooManyRequests            a queue or a limit is full                         (HTTP 429)
    ├── Unavailable                a part of the service is not there now             (HTTP 503)
    ├── InsufficientStorage        no space left for what was asked                   (HTTP 507)
    └── JobFailed                  the job ran and ended badly (`quality_gate`, `reload_mismatch`, …)

`service.errors` maps the tree to HTTP in one place; job processes store `ErrorBody` in the job's row.
Each message names the field, the value and the remedy.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from api_schemas.base import Frozen


class ModepressError(Exception):
    """Base of all errors that name themselves to a user.

    Attributes:
        code: stable snake_case name that scripts can rely on.
        message: one or two sentences naming field, value and remedy.
        param: dotted path of the offending field, or None.
    """

    type: ClassVar[str] = "invalid_request_error"
    status: ClassVar[int] = 400

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def body(self) -> "ErrorBody":
        """Return the four-key object that clients see."""
        return ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code)


class InvalidRequest(ModepressError):
    """A value the user sent is wrong."""


class InvalidCheckpoint(InvalidRequest):
    """A model folder or file is corrupt, incomplete, hostile or of no known architecture."""


class InvalidRecipe(InvalidRequest):
    """A recipe cannot be carried out on this model."""


class InvalidCalibration(InvalidRequest):
    """The calibration or evaluation text cannot serve."""


class NotAuthenticated(ModepressError):
    """No API key, or a wrong one."""

    type = "authentication_error"
    status = 401


class NotPermitted(ModepressError):
    """The caller is known; the thing is not allowed."""

    type = "permission_error"
    status = 403


class NotFound(ModepressError):
    """No such object."""

    type = "not_found_error"
    status = 404


class Conflict(ModepressError):
    """The object is in a state that forbids the call."""

    status = 409


class TooLarge(ModepressError):
    """More bytes than this server takes."""

    status = 413


class TooManyRequests(ModepressError):
    """A queue or a limit is full; try again later."""

    type = "rate_limit_error"
    status = 429

    def __init__(self, code: str, message: str, param: str | None = None, *, retry_after: float = 5.0) -> None:
        super().__init__(code, message, param)
        self.retry_after = retry_after  # seconds


class Unavailable(ModepressError):
    """A part of the service is not there now."""

    type = "server_error"
    status = 503


class InsufficientStorage(ModepressError):
    """No space left for what was asked."""

    type = "server_error"
    status = 507


class JobFailed(ModepressError):
    """A job ran and ended badly; `code` says how."""

    type = "job_error"
    status = 500


class ErrorBody(Frozen):
    """The inner object of every error answer (OpenAI's shape; all four keys always present)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Frozen):
    """What every failing route returns."""

    error: ErrorBody


def place_of(found: Mapping[str, Any], body: Any, skip: int = 0) -> tuple[str | int, ...]:
    """Where in `body` one of pydantic's errors lies.

    Its location also names the branch of a union, which no body holds, and not the field that chooses the branch.

    Args:
        found: one of `ValidationError.errors()`.
        body: what was validated.
        skip: leading parts of the location that lead to `body`.
    """
    location = tuple(found["loc"])[skip:]
    path: list[str | int] = []
    here = body
    for at, part in enumerate(location):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, Sequence) and not isinstance(here, str | bytes) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif found["type"] != "missing" or at + 1 < len(location):
            continue
        path.append(part)
    if found["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(str(found["ctx"]["discriminator"]).strip("'"))
    return tuple(path)
