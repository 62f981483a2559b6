"""The rows of an upload's parts."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api_schemas.errors import InvalidRequest
from api_schemas.files import UploadPart
from job_store.tables import UploadPartRow


def to_part(row: UploadPartRow) -> UploadPart:
    """Return the client's view of a row."""
    return UploadPart(
        id=row.id,
        created_at=int(row.created_at),
        upload_id=row.upload_id,
        number=row.number,
        bytes=row.bytes,
        sha256=row.sha256,
    )


def ordered_parts(session: Session, upload_id: str, part_ids: tuple[str, ...]) -> list[UploadPartRow]:
    """Return the rows of the parts named, in that order. Raises InvalidRequest `unknown_part`, `duplicate_part`."""
    rows = {row.id: row for row in session.scalars(select(UploadPartRow).where(UploadPartRow.upload_id == upload_id))}
    for index, part_id in enumerate(part_ids):
        if part_id not in rows:
            message = f"upload {upload_id!r} has no part {part_id!r} (a part sent again gets a new id); list its parts"
            raise InvalidRequest("unknown_part", message, f"part_ids.{index}")
    if len(set(part_ids)) != len(part_ids):
        raise InvalidRequest("duplicate_part", "part_ids names a part twice; name each once, in order", "part_ids")
    return [rows[part_id] for part_id in part_ids]


def replace_part(session: Session, upload_id: str, number: int | None) -> str | None:
    """Forget the part with this number, if there is one, and return its id: its file may go after the commit."""
    if number is None:
        return None
    statement = select(UploadPartRow).where(UploadPartRow.upload_id == upload_id, UploadPartRow.number == number)
    row = session.scalars(statement).one_or_none()
    if row is None:
        return None
    session.delete(row)
    session.flush()
    return row.id


def next_number(session: Session, upload_id: str) -> int:
    """Return the number after the highest: the order of arrival for clients who do not number."""
    highest = select(func.max(UploadPartRow.number)).where(UploadPartRow.upload_id == upload_id)
    return (session.scalar(highest) or 0) + 1
