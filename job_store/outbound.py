"""Connections to addresses that somebody else chose: to what was checked and nowhere else, within a deadline.

Images of chat requests and webhooks go through here. A name is looked up once; the connection is made to the addresses
that were found then, so that no second answer of the name server can lead elsewhere.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PATH_SAFE = "/%:@!$&'()*+,;=~?"
SHOWN = 80  # characters of a URL in a message

Resolve = Callable[[str, int], Sequence[str]]
Dial = Callable[[str, int, float], socket.socket]


class BadUrl(ValueError):
    """A URL that no connection is made to; the text says what it has."""


class Unresolved(Exception):
    """A name without addresses; the text says so."""


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


def split_url(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host in lower case, port and path with query. Raises BadUrl."""
    if any(letter <= " " or letter == "\x7f" for letter in url):
        raise BadUrl("it has white space or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".").encode("idna").decode("ascii").lower()
    except ValueError as error:  # UnicodeError is one
        raise BadUrl(f"{error}") from error
    if parts.scheme not in DEFAULT_PORTS:
        raise BadUrl(f"its scheme is {parts.scheme[:SHOWN]!r}")
    if parts.username is not None or parts.password is not None:
        raise BadUrl("it carries a user name or a password")
    if not host:
        raise BadUrl("it names no host")
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    path = quote(path, safe=PATH_SAFE)
    return parts.scheme, host, DEFAULT_PORTS[parts.scheme] if port is None else port, path or "/"


def is_listed(scheme: str, host: str, port: int, hosts: frozenset[str]) -> bool:
    """Whether a host is on an operator's list: `host` for ports 80 and 443, `host:port` for any other."""
    return f"{host}:{port}" in hosts or (host in hosts and port == DEFAULT_PORTS[scheme])


def system_resolver(host: str, port: int) -> list[str]:
    """Return a host's addresses, as this system finds them."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def look_up(host: str, port: int, resolve: Resolve) -> tuple[str, ...]:
    """Return a host's addresses. Raises Unresolved."""
    try:
        addresses = tuple(resolve(host, port))
    except (OSError, UnicodeError) as error:
        raise Unresolved("its name does not resolve") from error
    if not addresses:
        raise Unresolved("its name has no address")
    return addresses


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


def dial(address: str, port: int, seconds: float) -> socket.socket:
    """Connect to an address, not to a name: nothing is looked up again."""
    return socket.create_connection((address, port), timeout=seconds)


@contextmanager
def connected(target: Target, deadline: float, dial: Dial) -> Iterator[http.client.HTTPConnection]:
    """Open a connection that is shut at the deadline (monotonic clock), whatever it is doing then.

    Raises:
        OSError: no address lets us connect, or the certificate is not the host's.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(_dial_any(target, deadline, dial))]
        guard = threading.Timer(deadline - time.monotonic(), _shut, (opened,))
        stack.callback(guard.cancel)
        guard.start()
        if target.secure:
            context = ssl.create_default_context()
            secured = context.wrap_socket(opened[0], server_hostname=target.host, do_handshake_on_connect=False)
            opened.append(stack.enter_context(secured))
            secured.do_handshake()
        connection = stack.enter_context(closing(http.client.HTTPConnection(target.host, target.port)))
        connection.sock = opened[-1]
        yield connection


def _dial_any(target: Target, deadline: float, dial: Dial) -> socket.socket:
    """Connect to the first address that lets us: a machine may have no way to those of IPv6."""
    failed: OSError = TimeoutError()
    for address in target.addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return dial(address, target.port, left)
        except OSError as error:
            failed = error
    raise failed


def _shut(opened: list[socket.socket]) -> None:
    """End whatever the thread waits for: a server that drips bytes never lets a socket's own timeout pass."""
    with suppress(OSError):  # it ended by itself a moment ago
        opened[-1].shutdown(socket.SHUT_RDWR)
