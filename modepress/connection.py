"""One HTTP connection to a server: typed answers, named errors, retries where repeating is harmless."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from api_schemas.base import Frozen
from modepress.api_error import Unreachable, raise_for

Answer = TypeVar("Answer", bound=BaseModel)
RETRIES = 3
BUSY = frozenset({429, 502, 503, 504})
LONGEST_PAUSE_SECONDS = 30.0


class Connection:
    """Speaks to one server. Safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None, *, timeout: float) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env stays on: users behind a proxy have set it for a reason, and NO_PROXY covers loopback.
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=10.0))

    def close(self) -> None:
        """Close the sockets."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        *,
        body: Frozen | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool | None = None,
    ) -> Answer:
        """Send one request and parse the answer.

        Args:
            repeatable: whether sending it twice does no harm; default: yes for GET, HEAD and DELETE.

        Raises:
            ModepressApiError: the server refused or failed.
            Unreachable: no server answered.
        """
        content = None if body is None else body.model_dump_json(exclude_none=True).encode()
        sent = {} if content is None else {"Content-Type": "application/json"}
        harmless = method in {"GET", "HEAD", "DELETE"} if repeatable is None else repeatable
        every_header = {**sent, **(headers or {})}
        response = self.send(method, path, repeatable=harmless, content=content, params=params, headers=every_header)
        raise_for(response)
        # A newer server may say more than this client knows; what it does not know it leaves aside.
        return answer.model_validate_json(response.content, extra="ignore")

    def send(self, method: str, path: str, *, repeatable: bool, **arguments: Any) -> httpx.Response:
        """Send one request; repeat it on a lost connection or a busy server when it is `repeatable`."""
        left = RETRIES if repeatable else 0
        while True:
            pause = 0.2 * 2 ** (RETRIES - left)
            try:
                response = self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                if not left or isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol):
                    raise Unreachable(self.url, str(error) or type(error).__name__) from error
            else:
                if not left or response.status_code not in BUSY:
                    return response
                pause = max(pause, _asked_pause(response))
            left -= 1
            time.sleep(pause)

    @contextmanager
    def stream(self, method: str, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        """Open a streamed answer; its errors are read and raised."""
        try:
            with self._http.stream(method, path, **arguments) as response:
                if not response.is_success:
                    response.read()
                raise_for(response)
                yield response
        except httpx.TransportError as error:
            raise Unreachable(self.url, str(error) or type(error).__name__) from error


def _asked_pause(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "0")
    return min(float(value), LONGEST_PAUSE_SECONDS) if value.replace(".", "", 1).isdigit() else 0.0
