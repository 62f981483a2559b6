"""`/v1/models`: what can be compressed or chatted with."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from api_schemas.listing import Page
from api_schemas.models import Deleted, Model, ModelRequest
from service.deps import StoresOf

router = APIRouter(prefix="/v1/models", tags=["models"])
DOWNLOADING: dict[int | str, dict[str, Any]] = {202: {"model": Model, "description": "A worker downloads it"}}


@router.post("", status_code=201, responses=DOWNLOADING)
def register_model(body: ModelRequest, stores: StoresOf, response: Response) -> Model:
    """Register a model from uploaded files, a folder on the server or a hub id; its weights are not loaded."""
    model = stores.models.register(body)
    response.headers["location"] = f"/v1/models/{model.id}"
    if model.status == "downloading":
        response.status_code = 202
    return model


@router.get("")
def list_models(
    stores: StoresOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Page[Model]:
    """List models with what is known about them, newest first."""
    return stores.models.list(after=after, limit=limit)


@router.get("/{model_id}")
def get_model(model_id: str, stores: StoresOf) -> Model:
    """Read a model."""
    return stores.models.get(model_id)


@router.delete("/{model_id}")
def delete_model(model_id: str, stores: StoresOf) -> Deleted:
    """Delete a model; artifacts made from it stay. Refused while a job reads it."""
    stores.models.delete(model_id)
    return Deleted(id=model_id, object="model")
