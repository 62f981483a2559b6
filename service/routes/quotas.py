"""`/v1/quota`: what the caller's owner may have, and has."""

from fastapi import APIRouter

from api_schemas.quotas import QuotaState
from service.deps import CallerOf, StoresOf

router = APIRouter(prefix="/v1/quota", tags=["quota"])


@router.get("")
def get_quota(caller: CallerOf, stores: StoresOf) -> QuotaState:
    """Read the limits of the key's owner, and how much of them is used."""
    return stores.quotas.state(caller.owner)
