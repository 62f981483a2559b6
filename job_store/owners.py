"""Whose rows are whose. Every table that clients see names an owner; a viewer says which rows it may see."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute

from api_schemas.keys import DEFAULT_OWNER
from api_schemas.quotas import Quota


@dataclass(frozen=True)
class Viewer:
    """Through whose eyes a store reads, and under whose name it writes.

    Attributes:
        owner: new rows belong to it.
        sees_all: whether rows of others are there at all for this viewer.
        quota: limits of an owner that has none of its own; None: the server itself, which has no limits.
    """

    owner: str = DEFAULT_OWNER
    sees_all: bool = False
    quota: Quota | None = None

    def sees(self, owned_by: str) -> bool:
        """Whether a row of this owner exists for the viewer."""
        return self.sees_all or owned_by == self.owner

    def only(self, statement: Select[Any], owned_by: InstrumentedAttribute[str]) -> Select[Any]:
        """Return a query for those of its rows that the viewer may see."""
        return statement if self.sees_all else statement.where(owned_by == self.owner)


SERVER = Viewer(sees_all=True)
