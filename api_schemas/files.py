"""Files and resumable uploads, in OpenAI's shapes with a larger total and digests."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Purpose = Literal["model", "calibration", "fine-tune", "user_data"]


class FileObject(Frozen):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha256: str
    status: Literal["processed"] = "processed"


class UploadRequest(Frozen):
    """Body of `POST /v1/uploads`."""

    filename: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,512}$")]
    purpose: Purpose
    bytes: Annotated[int, Field(ge=0, le=2**53)]
    mime_type: Annotated[str, Field(max_length=256)] = "application/octet-stream"
    sha256: Annotated[Sha256 | None, Field(description="checked at completion; lets HEAD skip what is stored")] = None


class UploadPart(Frozen):
    """One part that arrived. `number` is the client's own, or the order of arrival."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    number: int
    bytes: int
    sha256: str


class CompleteRequest(Frozen):
    """Body of `POST /v1/uploads/{id}/complete`: the parts in order, and a digest of the whole."""

    part_ids: Annotated[tuple[str, ...], Field(max_length=100_000)]
    md5: Annotated[str | None, Field(pattern=r"^[0-9a-f]{32}$")] = None
    sha256: Sha256 | None = None


class Upload(Frozen):
    """An upload under way."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None
    part_bytes: Annotated[int, Field(description="largest part this server takes")]
