"""`/v1/compression/plans`: the dry run."""

from fastapi import APIRouter

from api_schemas.plans import Plan, PlanRequest
from service.deps import StoresOf
from service.submission import plan

router = APIRouter(prefix="/v1/compression/plans", tags=["compression"])


@router.post("")
def make_plan(body: PlanRequest, stores: StoresOf) -> Plan:
    """Say what a recipe would do to a model, how large it would be and what stands in the way; nothing is run."""
    return plan(stores, body.model, body.recipe)
