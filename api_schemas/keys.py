"""API keys as they are listed; the secret appears once, when a key is made."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen


class ApiKey(Frozen):
    """A key without its secret."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    created_at: int
    revoked_at: int | None


class NewApiKey(ApiKey):
    """A key just made, with the secret that is never shown again."""

    secret: Annotated[str, Field(description="mp_ and 256 random bits; send it as `Authorization: Bearer …`")]
