"""API keys as they are listed; the secret appears once, when a key is made."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen

Scope = Literal["admin", "submit", "infer", "read"]
OWNER_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
DEFAULT_OWNER = (
    "default"  # of keys made without an owner, of what callers without a key make, of rows older than owners
)


class ApiKey(Frozen):
    """A key without its secret."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    owner: Annotated[str, Field(description="whose models, jobs and files the key works with")]
    scopes: Annotated[
        tuple[Scope, ...],
        Field(
            description="read: look at what the owner has; submit: read, and make, change and delete it; infer: chat "
            "with the owner's models; admin: everything, of every owner"
        ),
    ]
    requests_per_minute: Annotated[int | None, Field(description="null: the server's setting")] = None
    concurrent_requests: Annotated[int | None, Field(description="null: the server's setting")] = None
    created_at: int
    revoked_at: int | None


class NewApiKey(ApiKey):
    """A key just made, with the secret that is never shown again."""

    secret: Annotated[str, Field(description="mp_ and 256 random bits; send it as `Authorization: Bearer …`")]
