"""`/v1/files`: what is stored, found by id or by digest."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from api_schemas.errors import NotFound
from api_schemas.files import FileObject, Purpose
from api_schemas.listing import Page
from api_schemas.models import Deleted
from service.deps import StoresOf
from service.openapi import FILE_BODY, RANGED
from service.receiving import receive_file
from service.sending import send_file

router = APIRouter(prefix="/v1/files", tags=["files"])
Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in lower-case hexadecimal")]


@router.post("", openapi_extra=FILE_BODY)
async def create_file(request: Request, stores: StoresOf, response: Response) -> FileObject:
    """Send one small file: multipart fields `file` and `purpose`."""
    file = await receive_file(stores, request)
    response.headers["location"] = f"/v1/files/{file.id}"
    return file


@router.get("")
def list_files(
    stores: StoresOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    purpose: Purpose | None = None,
) -> Page[FileObject]:
    """List files, newest first."""
    return stores.files.list(after=after, limit=limit, purpose=purpose)


@router.head("/sha256/{digest}", include_in_schema=False)
@router.get("/sha256/{digest}")
def find_file(digest: Digest, stores: StoresOf, response: Response) -> FileObject:
    """Ask whether these bytes are stored already; header `x-file-id` names a file that has them."""
    file = stores.files.find(digest)
    if file is None:
        raise NotFound("file_not_found", f"no stored file has SHA-256 {digest}; upload it", "digest")
    response.headers["x-file-id"] = file.id
    return file


@router.get("/{file_id}")
def get_file(file_id: str, stores: StoresOf) -> FileObject:
    """Read a file's record."""
    return stores.files.get(file_id)


@router.get("/{file_id}/content", response_class=Response, responses=RANGED)
def get_content(file_id: str, request: Request, stores: StoresOf) -> Response:
    """Download a file's bytes, or with `Range` a part of them; the `ETag` is the SHA-256."""
    name = stores.files.get(file_id).filename
    return send_file(request, stores.files.open(file_id), name)


@router.delete("/{file_id}")
def delete_file(file_id: str, stores: StoresOf) -> Deleted:
    """Delete a file; models registered from it keep their bytes. Refused while a job still needs it as text."""
    stores.files.delete(file_id)
    return Deleted(id=file_id, object="file")
