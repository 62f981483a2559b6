"""Fetches one image over HTTP: to the address that was checked, within a deadline, up to a number of bytes."""

import http.client
import time
from dataclasses import dataclass
from urllib.parse import urljoin

from job_store.outbound import Dial, Resolve, Target, connected, dial, system_resolver
from workers.inference.images.addresses import fetch_failed, resolve_target
from workers.inference.images.data_urls import too_large

MAX_REDIRECTS = 3
LATE = "the time for fetching is over"
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"User-Agent": "modepress", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}


@dataclass(frozen=True)
class Redirect:
    """Where a server says the image is."""

    location: str


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from allowed hosts.

    Attributes:
        hosts: names that may be asked.
        resolve: looks up a name.
        dial: opens a connection to an address and port, within seconds.
    """

    hosts: frozenset[str]
    resolve: Resolve = system_resolver
    dial: Dial = dial

    def fetch(self, url: str, max_bytes: int, deadline: float) -> bytes:
        """Return the body of the answer; each redirect is checked as the first URL was.

        Args:
            url: `http` or `https`.
            max_bytes: of the body.
            deadline: on the monotonic clock; the connection is shut then, whatever it is doing.

        Raises:
            InvalidRequest: what `resolve_target` raises, `image_fetch_failed` or `image_too_large`.
        """
        for _ in range(MAX_REDIRECTS + 1):
            target = resolve_target(url, self.hosts, self.resolve)
            answer = self._get(target, max_bytes, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer.location)
        raise fetch_failed(target.host, f"it redirects more than {MAX_REDIRECTS} times")

    def _get(self, target: Target, max_bytes: int, deadline: float) -> bytes | Redirect:
        try:
            answer = self._ask(target, max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= deadline
            raise fetch_failed(target.host, LATE if late else f"{type(error).__name__} while it was asked") from error
        if time.monotonic() >= deadline:  # a connection that was shut looks like the end of headers or body
            raise fetch_failed(target.host, LATE)
        return answer

    def _ask(self, target: Target, max_bytes: int, deadline: float) -> bytes | Redirect:
        with connected(target, deadline, self.dial) as connection:
            connection.request("GET", target.path, headers=HEADERS | {"Host": target.authority})
            with connection.getresponse() as answer:
                location = answer.headers.get("Location")
                if answer.status in REDIRECTS and location:
                    return Redirect(location)
                if answer.status != http.client.OK:
                    raise fetch_failed(target.host, f"it answers with status {answer.status}")
                return _body(answer, max_bytes)


def _body(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if answer.length is not None and answer.length > max_bytes:
        raise too_large(f"{answer.length} bytes", max_bytes)
    data = answer.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_large(f"more than {max_bytes} bytes", max_bytes)
    if answer.length:
        raise http.client.IncompleteRead(data, answer.length)
    return data
