"""`/v1/workers`: who works here, and what each found of itself."""

from typing import Annotated

from fastapi import APIRouter, Query

from api_schemas.listing import Page
from api_schemas.workers import Worker
from job_store.workers import WorkerStore
from service.deps import ServerStoresOf

router = APIRouter(prefix="/v1/workers", tags=["health"])


@router.get("")
def list_workers(stores: ServerStoresOf, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Page[Worker]:
    """List the latest workers, newest first, with their self-checks; those that failed say why."""
    found = WorkerStore(stores.engine).list(limit + 1)
    shown = found[:limit]
    return Page[Worker](
        data=shown,
        has_more=len(found) > limit,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
    )
