"""`/v1/models`: what can be compressed or chatted with."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api_schemas.listing import Page
from api_schemas.models import Deleted, Model, ModelFileObject, ModelRequest
from job_store.model_files import Digests
from service.deps import StoresOf
from service.openapi import RANGED
from service.sending import send_file

router = APIRouter(prefix="/v1/models", tags=["models"])
DOWNLOADING: dict[int | str, dict[str, Any]] = {
    202: {"model": Model, "description": "A worker downloads or imports it"}
}


@router.post("", status_code=201, responses=DOWNLOADING)
def register_model(body: ModelRequest, stores: StoresOf, response: Response) -> Model:
    """Register a model from uploaded files, a folder on the server, a hub id or published files to import."""
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


@router.get("/{model_id}/files")
def list_model_files(
    model_id: str,
    stores: StoresOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    digests: Annotated[Digests, Query(description="`all` counts SHA-256 that nobody has counted yet")] = "known",
) -> Page[ModelFileObject]:
    """List a model's files in the order of their paths: weights, configuration, tokenizer, exports."""
    return stores.model_files.list(model_id, after=after, limit=limit, digests=digests)


@router.head("/{model_id}/files/{path:path}/content", include_in_schema=False)
@router.get("/{model_id}/files/{path:path}/content", response_class=Response, responses=RANGED)
def get_model_file(model_id: str, path: str, request: Request, stores: StoresOf) -> Response:
    """Download one file, or with `Range` a part of it; its `ETag` is its SHA-256 where that is known."""
    return send_file(request, stores.model_files.open(model_id, path), path)
