"""What every error answer must look like."""

from typing import Any

import httpx

KEYS = {"message", "type", "param", "code"}


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check status, shape and code of an error answer and return its inner object."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == KEYS, error
    assert error["code"] == code, error
    assert error["message"], error
    assert answer.headers["x-request-id"]
    return error
