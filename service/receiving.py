"""Parts and small files: from a streamed multipart body into the stores."""

import re
from typing import get_args

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api_schemas.errors import InvalidRequest
from api_schemas.files import FileObject, Purpose, UploadPart
from job_store.uploads import MAX_PART_NUMBER
from service.deps import Stores
from service.multipart import Form, receive_form

PLAIN_NAME = re.compile(r"^[^\x00-\x1f\x7f]{1,512}$")


async def receive_part(stores: Stores, upload_id: str, request: Request) -> UploadPart:
    """Stream one part to disk and record it."""
    with await run_in_threadpool(stores.uploads.land, upload_id) as landing:
        form = await receive_form(request, landing, "data", ("number",))
        number = _number(form)
        landed = await run_in_threadpool(landing.finish)
    part = await run_in_threadpool(stores.uploads.add_part, upload_id, landed, number)
    stores.metrics.upload_bytes.inc(part.bytes)
    return part


async def receive_file(stores: Stores, request: Request) -> FileObject:
    """Stream one small file to disk and keep it."""
    with stores.files.land(limit=stores.settings.max_file_bytes) as landing:
        form = await receive_form(request, landing, "file", ("purpose",))
        purpose, filename = _purpose(form), _filename(form)
        landed = await run_in_threadpool(landing.finish)
    file = await run_in_threadpool(stores.files.keep, landed, filename=filename, purpose=purpose)
    stores.metrics.upload_bytes.inc(file.bytes)
    return file


def _number(form: Form) -> int | None:
    text = form.texts.get("number")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) > MAX_PART_NUMBER:
        raise InvalidRequest("invalid_value", f"number {text!r} is no whole number up to {MAX_PART_NUMBER}", "number")
    return int(text)


def _purpose(form: Form) -> str:
    purpose = form.texts.get("purpose")
    if purpose is None:
        raise InvalidRequest("missing_field", "purpose is missing; add it as a text field", "purpose")
    if purpose not in get_args(Purpose):
        allowed = ", ".join(get_args(Purpose))
        raise InvalidRequest("invalid_value", f"purpose {purpose!r} is not one of {allowed}", "purpose")
    return purpose


def _filename(form: Form) -> str:
    if not PLAIN_NAME.match(form.filename):
        message = (
            f"the file field's filename {form.filename[:120]!r} must have 1 to 512 characters, no control characters"
        )
        raise InvalidRequest("invalid_value", message, "file")
    return form.filename
