"""Who did what, when."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen


class AuditEntry(Frozen):
    """One request that changed something or was refused to, or one command on the server's machine."""

    id: int
    object: Literal["audit.entry"] = "audit.entry"
    created_at: int
    actor: Annotated[str, Field(description="id of a key, `loopback`, or `cli:` and the user of the machine")]
    owner: str
    action: Annotated[str, Field(description="method and route, or the command")]
    target: Annotated[str | None, Field(description="id of what was made, changed or deleted")]
    status: Annotated[int, Field(description="of the answer; 0 for a command")]
    address: Annotated[str | None, Field(description="of the caller")]
    request_id: str | None
