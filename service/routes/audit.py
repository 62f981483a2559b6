"""`/v1/audit`: who did what when, for admins."""

from typing import Annotated

from fastapi import APIRouter, Query

from api_schemas.audit import AuditEntry
from api_schemas.listing import Page
from service.deps import StoresOf

router = APIRouter(prefix="/v1/audit", tags=["audit"])


@router.get("")
def list_audit(
    stores: StoresOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    owner: str | None = None,
) -> Page[AuditEntry]:
    """List what was done, newest first."""
    return stores.audit.list(after=after, limit=limit, owner=owner)
