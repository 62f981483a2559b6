"""The pairs that clients hang on jobs, and how jobs are found by them."""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, exists, func, select, true
from sqlalchemy.orm import Session

from api_schemas.errors import InvalidRequest
from job_store.tables import JobRow


def refuse_nul(metadata: Mapping[str, str]) -> None:
    """Refuse what PostgreSQL cannot hold. Raises InvalidRequest `invalid_metadata`."""
    for key, value in metadata.items():
        if "\0" in key or "\0" in value:  # PostgreSQL's text cannot hold it
            raise InvalidRequest("invalid_metadata", f"metadata {key!r} holds a NUL character; remove it", "metadata")


def carries(session: Session, key: str, value: str) -> ColumnElement[bool]:
    """Return the condition that a job carries this pair."""
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    pairs = each(JobRow.job_metadata).table_valued("key", "value")
    found = select(true()).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value)
    return exists(found.correlate(JobRow))
