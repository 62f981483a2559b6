"""Who may call: keys, revoked keys, loopback without keys, and nobody else."""

from pathlib import Path

import httpx
import pytest

from api_schemas.errors import InvalidRequest
from job_store.database import make_engine
from job_store.keys import KeyStore
from job_store.settings import Settings
from service.app import create_app
from service.auth import is_loopback
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic dXNlcjpwYXNz", "missing_api_key"),
        ("Bearer mp_wrong", "invalid_api_key"),
        ("Bearer mp_" + "A" * 43, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/models", "/v1/nothing", "/v1/compression/jobs"])
def test_without_a_valid_key(api: RunningApi, header: str | None, code: str, route: str) -> None:
    headers = {} if header is None else {"authorization": header}
    answer = httpx.get(api.url + route, headers=headers, trust_env=False)
    error = error_of(answer, 401, code)
    assert (error["type"], error["param"]) == ("authentication_error", "Authorization")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_key_comes_before_the_body(api: RunningApi) -> None:
    answer = httpx.post(f"{api.url}/v1/uploads", content=b"{", trust_env=False)
    error_of(answer, 401, "missing_api_key")


def test_a_revoked_key_is_refused_at_once(api: RunningApi) -> None:
    engine = make_engine(api.settings().resolved_database_url)
    keys = KeyStore(engine)
    made = keys.create("second")
    headers = {"authorization": f"Bearer {made.secret}"}
    assert httpx.get(f"{api.url}/v1/models", headers=headers, trust_env=False).status_code == 200
    keys.revoke(made.id)
    engine.dispose()
    error_of(httpx.get(f"{api.url}/v1/models", headers=headers, trust_env=False), 401, "invalid_api_key")


@pytest.mark.parametrize("route", ["/healthz", "/readyz", "/metrics", "/openapi.json"])
def test_open_routes_need_no_key(api: RunningApi, route: str) -> None:
    assert httpx.get(api.url + route, trust_env=False).status_code in (200, 503)


def test_without_keys_only_this_machine_is_answered(tmp_path: Path) -> None:
    with running_api(tmp_path / "home", auth="none") as api:
        port = httpx.URL(api.url).port
        good = {"host": f"localhost:{port}", "origin": f"http://127.0.0.1:{port}"}
        assert httpx.get(f"{api.url}/v1/models", trust_env=False).status_code == 200
        assert httpx.get(f"{api.url}/v1/models", headers=good, trust_env=False).status_code == 200
        for bad in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
            answer = httpx.get(f"{api.url}/v1/models", headers=bad, trust_env=False)
            assert error_of(answer, 403, "loopback_only")["type"] == "permission_error"


def test_strangers_need_keys(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="MODEPRESS_AUTH=required") as caught:
        create_app(Settings(home=tmp_path, auth="none", host="0.0.0.0"))  # noqa: S104 (what the test is about)
    assert caught.value.code == "auth_required"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")),
        *((host, False) for host in ("0.0.0.0", "192.168.1.5", "localhost.evil.example", "")),  # noqa: S104
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
