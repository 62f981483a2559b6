"""Who may call, and what: bearers of a key by its scopes, or, with auth 'none', callers on this machine alone.

A middleware and not a dependency: the framework reads the body before it asks its dependencies.
"""

import ipaddress
from urllib.parse import urlsplit

from fastapi.security import HTTPBearer
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api_schemas.errors import InvalidRequest, ModepressError, NotAuthenticated, NotPermitted
from job_store.keys import KeyStore
from job_store.settings import Settings
from service.errors import render_database, render_named
from service.permissions import NEIGHBOUR, Caller, Permissions, caller_of

GUARDED = "/v1/"
# Only for the OpenAPI document; `Authentication` does the work.
BEARER = HTTPBearer(auto_error=False, description="an API key made with `modepress keys create`")


def require_safe_address(settings: Settings) -> None:
    """Refuse to serve strangers without keys. Raises InvalidRequest `auth_required`."""
    if settings.auth == "none" and not is_loopback(settings.host):
        message = f"auth 'none' is for loopback only, and host is {settings.host!r}; set MODEPRESS_AUTH=required"
        raise InvalidRequest("auth_required", message, "auth")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Authentication:
    """Turns away requests under /v1/ that carry no valid key, or one without the scope. Sets `state.caller`."""

    def __init__(self, app: ASGIApp, keys: KeyStore, permissions: Permissions, settings: Settings) -> None:
        self._app = app
        self._keys = keys
        self._permissions = permissions
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request or answer 401 or 403."""
        if scope["type"] == "http" and scope["path"].startswith(GUARDED):
            request = Request(scope)
            try:
                if self._settings.auth == "none":
                    _require_neighbour(request)
                    caller = NEIGHBOUR
                else:
                    caller = await run_in_threadpool(self._caller, request)
                request.state.caller = caller
                self._permissions.require(scope, caller)
            except ModepressError as error:
                await render_named(request, error)(scope, receive, send)
                return
            except OperationalError as error:
                await render_database(request, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, request: Request) -> Caller:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            message = "no API key: send `Authorization: Bearer mp_…`; make one with `modepress keys create`"
            raise NotAuthenticated("missing_api_key", message, "Authorization")
        key = self._keys.recognise(secret.strip())
        if key is None:
            message = "this API key is unknown or was revoked; make one with `modepress keys create`"
            raise NotAuthenticated("invalid_api_key", message, "Authorization")
        return caller_of(key)


def _require_neighbour(request: Request) -> None:
    # Without keys, a web page in the user's browser is the stranger: it reaches loopback under its own Origin, or under
    # a name of its own that it points at 127.0.0.1.
    origin = request.headers.get("origin")
    hosts = {"Host": request.url.hostname or "", "Origin": urlsplit(origin).hostname or "" if origin else "localhost"}
    for header, host in hosts.items():
        if not is_loopback(host):
            message = f"{header} {host!r} is not loopback; without keys this server answers its own machine alone"
            raise NotPermitted("loopback_only", message, header)
    if request.client is not None and not is_loopback(request.client.host):
        raise NotPermitted("loopback_only", f"caller {request.client.host!r} is on another machine; use API keys")
