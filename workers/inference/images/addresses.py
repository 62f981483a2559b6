"""Which addresses images may be fetched from: names on the operator's list that resolve to the public internet."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from api_schemas.errors import InvalidRequest

DEFAULT_PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
SHOWN = 80  # characters of a URL in a message
PATH_SAFE = "/%:@!$&'()*+,;=~?"

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True)
class Target:
    """What one request is made to: a host that is allowed, and the addresses it had when it was looked up."""

    secure: bool
    host: str
    port: int
    addresses: tuple[str, ...]
    path: str

    @property
    def authority(self) -> str:
        """The value of the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS["https" if self.secure else "http"] else f"{host}:{self.port}"


def system_resolver(host: str, port: int) -> list[str]:
    """Return a host's addresses, as this system finds them."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def resolve_target(url: str, hosts: frozenset[str], resolve: Resolve) -> Target:
    """Check a URL, look its host up once, and return where to connect.

    Args:
        url: `http` or `https`.
        hosts: names that may be asked, in lower case; with `:port` for another port than 80 and 443.
        resolve: looks up a name.

    Raises:
        InvalidRequest: `invalid_image_url`, `image_host_not_allowed`, `image_address_not_allowed` or
            `image_fetch_failed`.
    """
    scheme, host, port, path = _split(url)
    if f"{host}:{port}" not in hosts and not (host in hosts and port == DEFAULT_PORTS[scheme]):
        message = (
            f"images are not fetched from {host[:SHOWN]!r} (port {port}); send the image as a data: URL, or let the "
            "operator add the host to MODEPRESS_IMAGE_HOSTS"
        )
        raise InvalidRequest("image_host_not_allowed", message)
    try:
        addresses = list(resolve(host, port))
    except (OSError, UnicodeError) as error:
        raise fetch_failed(host, "its name does not resolve") from error
    if not addresses:
        raise fetch_failed(host, "its name has no address")
    if not all(map(is_public, addresses)):
        message = f"{host!r} resolves to an address that is not on the public internet; send the image as a data: URL"
        raise InvalidRequest("image_address_not_allowed", message)
    return Target(scheme == "https", host, port, tuple(addresses), path)


def is_public(address: str) -> bool:
    """Whether an address can only be a host on the public internet, also when IPv4 is written inside IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def fetch_failed(host: str, what: str) -> InvalidRequest:
    """Return the error of an allowed host that did not give an image."""
    message = f"no image came from {host!r}: {what}; send the image as a data: URL"
    return InvalidRequest("image_fetch_failed", message)


def _split(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host in lower case, port and path with query."""
    if any(letter <= " " or letter == "\x7f" for letter in url):
        raise _invalid(url, "it has white space or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".").encode("idna").decode("ascii").lower()
    except ValueError as error:  # UnicodeError is one
        raise _invalid(url, f"{error}") from error
    if parts.scheme not in DEFAULT_PORTS:
        raise _invalid(url, f"its scheme is {parts.scheme[:SHOWN]!r}")
    if parts.username is not None or parts.password is not None:
        raise _invalid(url, "it carries a user name or a password")
    if not host:
        raise _invalid(url, "it names no host")
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    path = quote(path, safe=PATH_SAFE)
    return parts.scheme, host, DEFAULT_PORTS[parts.scheme] if port is None else port, path or "/"


def _invalid(url: str, what: str) -> InvalidRequest:
    message = f"image_url.url {url[:SHOWN]!r} cannot be used: {what}; send data:image/png;base64,… or https://host/path"
    return InvalidRequest("invalid_image_url", message)
