"""Which scope each route asks for: one table, looked up before a body is read. `admin` may do everything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope as AsgiScope

from api_schemas.errors import NotPermitted
from api_schemas.keys import DEFAULT_OWNER, ApiKey, Scope
from api_schemas.quotas import Quota
from job_store.owners import Viewer

# Any of these will do; none: admin alone. Who may submit may read what became of it, who may chat may see with what.
READ: tuple[Scope, ...] = ("read", "submit")
SUBMIT: tuple[Scope, ...] = ("submit",)
INFER: tuple[Scope, ...] = ("infer",)
NAMES: tuple[Scope, ...] = ("read", "submit", "infer")

CONTENT = "/v1/models/{model_id}/files/{path:path}/content"
JOB = "/v1/compression/jobs/{job_id}"
UPLOAD = "/v1/uploads/{upload_id}"
PERMITTED: Mapping[tuple[str, str], tuple[Scope, ...]] = {
    ("POST", "/v1/uploads"): SUBMIT,
    ("GET", UPLOAD): READ,
    ("POST", f"{UPLOAD}/parts"): SUBMIT,
    ("GET", f"{UPLOAD}/parts"): READ,
    ("POST", f"{UPLOAD}/complete"): SUBMIT,
    ("POST", f"{UPLOAD}/cancel"): SUBMIT,
    ("POST", "/v1/files"): SUBMIT,
    ("GET", "/v1/files"): READ,
    ("HEAD", "/v1/files/sha256/{digest}"): READ,
    ("GET", "/v1/files/sha256/{digest}"): READ,
    ("GET", "/v1/files/{file_id}"): READ,
    ("GET", "/v1/files/{file_id}/content"): READ,
    ("DELETE", "/v1/files/{file_id}"): SUBMIT,
    ("POST", "/v1/models"): SUBMIT,
    ("GET", "/v1/models"): NAMES,
    ("GET", "/v1/models/{model_id}"): NAMES,
    ("DELETE", "/v1/models/{model_id}"): SUBMIT,
    ("GET", "/v1/models/{model_id}/files"): READ,
    ("HEAD", CONTENT): READ,
    ("GET", CONTENT): READ,
    ("POST", "/v1/compression/plans"): READ,
    ("POST", "/v1/compression/jobs"): SUBMIT,
    ("GET", "/v1/compression/jobs"): READ,
    ("GET", JOB): READ,
    ("POST", f"{JOB}/cancel"): SUBMIT,
    ("GET", f"{JOB}/events"): READ,
    ("GET", f"{JOB}/report"): READ,
    ("GET", f"{JOB}/trace"): READ,
    ("GET", "/v1/quota"): NAMES,
    ("GET", "/v1/workers"): READ,
    ("GET", "/v1/audit"): (),
    ("POST", "/v1/webhooks"): SUBMIT,
    ("GET", "/v1/webhooks"): READ,
    ("GET", "/v1/webhooks/{webhook_id}"): READ,
    ("DELETE", "/v1/webhooks/{webhook_id}"): SUBMIT,
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): READ,
    ("POST", "/v1/chat/completions"): INFER,
    ("POST", "/v1/completions"): INFER,
}


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        name: id of the key, or `loopback` where none is asked for.
        owner: whose rows it works with.
        scopes: what it may do.
        per_minute: requests of the key; None: the setting holds.
        at_once: likewise.
    """

    name: str
    owner: str
    scopes: tuple[Scope, ...]
    per_minute: int | None = None
    at_once: int | None = None

    def viewer(self, quota: Quota) -> Viewer:
        """What the caller sees of the stores, and the limits where its owner has none of its own."""
        return Viewer(self.owner, sees_all="admin" in self.scopes, quota=quota)


NEIGHBOUR = Caller("loopback", DEFAULT_OWNER, ("admin",))


def caller_of(key: ApiKey) -> Caller:
    """Return who a key stands for."""
    return Caller(key.id, key.owner, key.scopes, key.requests_per_minute, key.concurrent_requests)


class Permissions:
    """Says whether a caller may take a route.

    Raises:
        LookupError: a route has no row in the table. Nobody forgets one unseen: the application does not start.
    """

    def __init__(self, routers: Sequence[APIRouter]) -> None:
        self._routes = [
            (route, {method: PERMITTED[method, route.path] for method in route.methods or ()})
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute)
        ]

    def require(self, scope: AsgiScope, caller: Caller) -> None:
        """Refuse what the caller's scopes do not cover. Unknown routes and methods are left to the router.

        Raises:
            NotPermitted: `missing_scope`.
        """
        if "admin" in caller.scopes:
            return
        for route, permitted in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                wanted = permitted[scope["method"]]
                if not set(wanted) & set(caller.scopes):
                    raise _missing_scope(scope, caller, wanted)
                return


def _missing_scope(scope: AsgiScope, caller: Caller, wanted: Sequence[Scope]) -> NotPermitted:
    words = " or ".join(map(repr, wanted or ("admin",)))
    message = (
        f"{scope['method']} {scope['path'][:120]} needs the scope {words}, and key {caller.name!r} has "
        f"{', '.join(caller.scopes)}; use another key, or make one with `modepress keys create NAME --scope …`"
    )
    return NotPermitted("missing_scope", message, "Authorization")
