"""`/v1/uploads`: large files in parts, in any order, resumable."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api_schemas.files import CompleteRequest, Upload, UploadPart, UploadRequest
from api_schemas.listing import Page
from service.deps import StoresOf
from service.openapi import PART_BODY
from service.receiving import receive_part

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


@router.post("")
def create_upload(body: UploadRequest, stores: StoresOf, response: Response) -> Upload:
    """Open an upload for one file of a declared size."""
    upload = stores.uploads.create(body)
    response.headers["location"] = f"/v1/uploads/{upload.id}"
    return upload


@router.get("/{upload_id}")
def get_upload(upload_id: str, stores: StoresOf) -> Upload:
    """Read an upload."""
    return stores.uploads.get(upload_id)


@router.post("/{upload_id}/parts", openapi_extra=PART_BODY)
async def add_part(upload_id: str, request: Request, stores: StoresOf) -> UploadPart:
    """Send one part: multipart field `data`, and optionally its `number`. The same number again replaces it."""
    return await receive_part(stores, upload_id, request)


@router.get("/{upload_id}/parts")
def list_parts(
    upload_id: str,
    stores: StoresOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[UploadPart]:
    """List the parts that arrived, by number: the rest is what a resumed upload has to send."""
    return stores.uploads.parts(upload_id, after=after, limit=limit)


@router.post("/{upload_id}/complete")
def complete_upload(upload_id: str, body: CompleteRequest, stores: StoresOf) -> Upload:
    """Join the parts in the order given, check size and digests, and answer with the file."""
    return stores.uploads.complete(upload_id, body)


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, stores: StoresOf) -> Upload:
    """Give the upload up and free its parts."""
    return stores.uploads.cancel(upload_id)
