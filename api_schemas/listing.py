"""The list envelope of every collection (OpenAI's cursor form)."""

from typing import Generic, Literal, TypeVar

from api_schemas.base import Frozen

Item = TypeVar("Item")


class Page(Frozen, Generic[Item]):
    """One page; the next starts `after` `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None
