"""Answers of the health routes."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen


class Alive(Frozen):
    """Answer of `/healthz`: the process runs."""

    status: Literal["ok"] = "ok"


class Check(Frozen):
    """One thing that was tried."""

    ok: bool
    detail: Annotated[str, Field(description="what was found, or why it failed")]


class Readiness(Frozen):
    """Answer of `/readyz`: ready when every check passed."""

    status: Literal["ready", "not_ready"]
    checks: Annotated[dict[str, Check], Field(description="database, broker, inference")]
