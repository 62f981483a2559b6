"""API keys: 256-bit tokens of which only the SHA-256 is kept."""

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import cast, get_args

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from api_schemas.errors import InvalidRequest, NotFound
from api_schemas.keys import DEFAULT_OWNER, OWNER_PATTERN, ApiKey, NewApiKey, Scope
from job_store.tables import ApiKeyRow

PREFIX = "mp_"


class KeyStore:
    """Creates, lists, revokes and recognises API keys."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def create(
        self,
        name: str,
        *,
        scopes: Sequence[Scope] = ("admin",),
        owner: str = DEFAULT_OWNER,
        requests_per_minute: int | None = None,
        concurrent_requests: int | None = None,
    ) -> NewApiKey:
        """Make a key; the returned secret is shown this once and never stored.

        Args:
            name: what it is for.
            scopes: what it may do.
            owner: whose rows it works with.
            requests_per_minute: None: the server's setting; 0: no limit.
            concurrent_requests: likewise.

        Raises:
            InvalidRequest: `invalid_owner`; `no_scopes`.
        """
        _check(scopes, owner)
        secret = PREFIX + secrets.token_urlsafe(32)
        row = ApiKeyRow(
            id=f"key_{secrets.token_hex(12)}",
            created_at=self._clock(),
            name=name,
            digest=_digest(secret),
            revoked_at=None,
            owned_by=owner,
            requests_per_minute=requests_per_minute,
            concurrent_requests=concurrent_requests,
            scopes=[scope for scope in get_args(Scope) if scope in scopes],
        )
        with Session(self._engine) as session, session.begin():
            session.add(row)
            session.flush()
            return NewApiKey(**_to_key(row).model_dump(), secret=secret)

    def list(self) -> list[ApiKey]:
        """All keys, oldest first, revoked ones included."""
        with Session(self._engine) as session:
            rows = session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return [_to_key(row) for row in rows]

    def revoke(self, key_id: str) -> ApiKey:
        """Refuse the key from now on; revoking twice keeps the first date. Raises NotFound."""
        with Session(self._engine) as session, session.begin():
            row = session.get(ApiKeyRow, key_id)
            if row is None:
                raise NotFound("key_not_found", f"no API key has id {key_id!r}; list the keys to see their ids", "id")
            if row.revoked_at is None:
                row.revoked_at = self._clock()
            return _to_key(row)

    def recognise(self, secret: str) -> ApiKey | None:
        """Return the key with this secret, or None when there is none or it was revoked."""
        with Session(self._engine) as session:
            statement = select(ApiKeyRow).where(ApiKeyRow.digest == _digest(secret))
            row = session.scalars(statement).one_or_none()
            return None if row is None or row.revoked_at is not None else _to_key(row)


def _check(scopes: Sequence[Scope], owner: str) -> None:
    if not re.fullmatch(OWNER_PATTERN, owner):
        message = f"owner {owner[:80]!r} must be 1 to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first"
        raise InvalidRequest("invalid_owner", message, "owner")
    if not scopes:
        raise InvalidRequest("no_scopes", f"a key needs a scope; give some of {', '.join(get_args(Scope))}", "scopes")


def _digest(secret: str) -> str:
    # A plain hash serves: the secret carries 256 random bits, so there is no dictionary to slow down.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _to_key(row: ApiKeyRow) -> ApiKey:
    revoked_at = None if row.revoked_at is None else int(row.revoked_at)
    return ApiKey(
        id=row.id,
        name=row.name,
        owner=row.owned_by,
        requests_per_minute=row.requests_per_minute,
        concurrent_requests=row.concurrent_requests,
        scopes=tuple(cast(list[Scope], row.scopes)),
        created_at=int(row.created_at),
        revoked_at=revoked_at,
    )
