"""What an owner may have, and has."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen


class Quota(Frozen):
    """The limits of one owner. Null: none."""

    bytes: Annotated[int | None, Field(ge=0, description="files, uploads under way and models, together")] = None
    jobs: Annotated[int | None, Field(ge=0, description="waiting or running at a time")] = None
    tokens: Annotated[int | None, Field(ge=0, description="read and generated in chat, per day (UTC)")] = None


class Used(Frozen):
    """What counts against a quota now."""

    bytes: int
    jobs: int
    tokens: int


class QuotaState(Frozen):
    """Answer of `GET /v1/quota`."""

    object: Literal["quota"] = "quota"
    owner: str
    limits: Quota
    used: Used
