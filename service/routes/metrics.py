"""`/metrics`: Prometheus' text format."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.deps import ServerStoresOf
from service.openapi import METRICS

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, responses=METRICS)
def metrics(stores: ServerStoresOf) -> Response:
    """Read all metrics."""
    return Response(stores.metrics.text(), media_type=CONTENT_TYPE_LATEST)
