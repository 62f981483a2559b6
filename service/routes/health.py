"""`/healthz`: alive. `/readyz`: able to work."""

from typing import Any

from fastapi import APIRouter, Response

from api_schemas.health import Alive, Readiness
from service.deps import ServerStoresOf
from service.readiness import readiness

router = APIRouter(tags=["health"])
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "A check failed"}}


@router.get("/healthz")
async def alive() -> Alive:
    """Say that the process runs."""
    return Alive()


@router.get("/readyz", responses=NOT_READY)
async def ready(stores: ServerStoresOf, response: Response) -> Readiness:
    """Try database, broker and inference process."""
    found = await readiness(stores)
    response.status_code = 200 if found.status == "ready" else 503
    return found
