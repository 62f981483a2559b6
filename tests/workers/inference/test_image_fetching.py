"""Fetching images: over real connections, to the address that was checked, bounded in time and bytes."""

import socket
import ssl
import threading
import time
from contextlib import contextmanager

import pytest

from tests.workers.inference.test_image_urls import ALSO_PUBLIC, FILE, PUBLIC, refusal
from workers.inference.images.fetching import MAX_REDIRECTS, Fetcher

# For images.example.org, signed by itself, from 2020 to 2120; it is of no use anywhere else.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg+fmJr/39GNrsuIVj
/+Z96EUpe999ciCjW1P79PHruTqhRANCAATEtdN8XHH2Kei76ndSOlcATQ8EJCv/
l/jfUB9lZ4l8gm6vF1KPsTls6tNljt/x5YiYk+f+LCoOivF69+6or+Rr
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnjCCAUOgAwIBAgIBATAKBggqhkjOPQQDAjAdMRswGQYDVQQDDBJpbWFnZXMu
ZXhhbXBsZS5vcmcwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMB0x
GzAZBgNVBAMMEmltYWdlcy5leGFtcGxlLm9yZzBZMBMGByqGSM49AgEGCCqGSM49
AwEHA0IABMS103xccfYp6Lvqd1I6VwBNDwQkK/+X+N9QH2VniXyCbq8XUo+xOWzq
02WO3/HliJiT5/4sKg6K8Xr37qiv5GujcjBwMB0GA1UdEQQWMBSCEmltYWdlcy5l
eGFtcGxlLm9yZzAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBR6CB+7QFXO5KDO
k6kiit7iuoj9RzAfBgNVHSMEGDAWgBR6CB+7QFXO5KDOk6kiit7iuoj9RzAKBggq
hkjOPQQDAgNJADBGAiEA0Z75sgBDpV/OO5d5zHt3yhaSbJU3D0n3W9IcF29tN18C
IQC3P2FtHEWd1Xp2NZUWztTkAgNG8qMsQqMkoE3JFKgkUg==
-----END CERTIFICATE-----
"""


class Host:
    """A real server on loopback that answers each connection with the next of its scripts; a dial leads there."""

    def __init__(self, scripts, secure):
        self._secure = secure
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._scripts = list(scripts)
        self.requests = []
        self.dialled = []
        threading.Thread(target=self._serve, daemon=True).start()

    def dial(self, address, port, seconds):
        self.dialled.append((address, port))
        return socket.create_connection(self._listener.getsockname(), timeout=seconds)

    def close(self):
        self._listener.close()

    def _serve(self):
        for script in self._scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    if not self._secure:
                        self.requests.append(connection.recv(65536).decode("latin-1"))
                    script(connection)
                except OSError:
                    continue


def sends(head, body=b"", *, length=True):
    size = f"Content-Length: {len(body)}\r\n" if length else ""
    return lambda connection: connection.sendall(f"HTTP/1.1 {head}\r\n{size}\r\n".encode() + body)


def moves(location, status=302):
    return sends(f"{status} Moved\r\nLocation: {location}")


@contextmanager
def hosting(
    *scripts, secure=False, names=("images.example.org",), resolve=lambda *_: [PUBLIC], seconds=20.0, limit=10_000
):
    host = Host(scripts, secure)
    fetcher = Fetcher(frozenset(names), resolve=resolve, dial=host.dial)
    try:
        yield host, lambda url: fetcher.fetch(url, limit, time.monotonic() + seconds)
    finally:
        host.close()


def test_an_image_is_fetched_from_the_address_that_was_checked():
    with hosting(sends("200 OK", FILE)) as (host, fetch):
        assert fetch("http://Images.Example.org/a/b.png?size=1") == FILE
    assert host.dialled == [(PUBLIC, 80)]
    first, *headers = host.requests[0].splitlines()
    assert first == "GET /a/b.png?size=1 HTTP/1.1"
    assert "Host: images.example.org" in headers
    assert "Accept-Encoding: identity" in headers


def test_an_address_without_a_way_to_it_is_passed_over():
    with hosting(sends("200 OK", FILE)) as (host, _):

        def only_ipv4(address, port, seconds):
            if ":" in address:
                raise OSError("network is unreachable")
            return host.dial(address, port, seconds)

        fetcher = Fetcher(frozenset({"a.example.org"}), resolve=lambda *_: [ALSO_PUBLIC, PUBLIC], dial=only_ipv4)
        assert fetcher.fetch("http://a.example.org/", 10_000, time.monotonic() + 20) == FILE
        assert host.dialled == [(PUBLIC, 80)]


def test_a_name_is_looked_up_once_so_rebinding_changes_nothing():
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    with hosting(sends("200 OK", FILE), resolve=lambda *_: next(answers)) as (host, fetch):
        assert fetch("http://images.example.org/") == FILE
        assert host.dialled == [(PUBLIC, 80)]
        assert refusal(fetch, "http://images.example.org/").code == "image_address_not_allowed"


def test_rebinding_between_two_redirects_is_seen():
    answers = iter([[PUBLIC], ["169.254.169.254"]])
    with hosting(moves("/again"), resolve=lambda *_: next(answers)) as (host, fetch):
        assert refusal(fetch, "http://images.example.org/").code == "image_address_not_allowed"
        assert len(host.dialled) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    with hosting(moves("/b.png", status), sends("200 OK", FILE)) as (host, fetch):
        assert fetch("http://images.example.org/a.png") == FILE
    assert host.requests[1].startswith("GET /b.png ")


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1/", "image_host_not_allowed"),
        ("http://169.254.169.254/latest", "image_host_not_allowed"),
        ("//elsewhere.example.org/x", "image_host_not_allowed"),
        ("http://images.example.org:22/", "image_host_not_allowed"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://inside.example.org/", "image_address_not_allowed"),
    ],
)
def test_redirects_are_checked_like_the_first_url(location, code):
    def resolve(name, _):
        return ["10.0.0.1"] if name.startswith("inside") else [PUBLIC]

    names = ("images.example.org", "inside.example.org")
    with hosting(moves(location), names=names, resolve=resolve) as (host, fetch):
        assert refusal(fetch, "http://images.example.org/").code == code
        assert len(host.dialled) == 1


def test_redirects_end():
    with hosting(*[moves("/again")] * 9) as (host, fetch):
        error = refusal(fetch, "http://images.example.org/")
    assert (error.code, len(host.dialled)) == ("image_fetch_failed", MAX_REDIRECTS + 1)


@pytest.mark.parametrize("head", ["404 Not Found", "500 Oops", "204 No Content", "302 Moved"])
def test_other_answers_are_named(head):
    with hosting(sends(head, b"x")) as (_, fetch):
        error = refusal(fetch, "http://images.example.org/")
    assert error.code == "image_fetch_failed"
    assert head[:3] in error.message


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (sends("200 OK\r\nContent-Length: 99999999999"), "image_too_large"),
        (sends("200 OK", bytes(10_001)), "image_too_large"),
        (sends("200 OK", bytes(10_001), length=False), "image_too_large"),
        (sends("200 OK\r\nContent-Length: 500", bytes(100), length=False), "image_fetch_failed"),
        (sends("nonsense"), "image_fetch_failed"),
        (lambda connection: connection.sendall(b"\x00" * 100_000), "image_fetch_failed"),
        (lambda _: None, "image_fetch_failed"),
    ],
)
def test_hostile_answers_are_bounded(script, code):
    with hosting(script) as (_, fetch):
        assert refusal(fetch, "http://images.example.org/").code == code


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"])
def test_a_server_that_drips_is_cut_at_the_deadline(start):
    patience = []

    def drip(connection):
        connection.sendall(start)
        for _ in range(400):
            connection.sendall(b"a")
            time.sleep(0.05)
        patience.append("ended first")

    with hosting(drip, seconds=0.5) as (_, fetch):
        error = refusal(fetch, "http://images.example.org/")
    assert error.code == "image_fetch_failed"
    assert "time" in error.message
    assert patience == []


def test_https_is_never_spoken_in_the_clear():
    with hosting(sends("200 OK", FILE)) as (host, fetch):
        error = refusal(fetch, "https://images.example.org/")
    assert error.code == "image_fetch_failed"
    assert host.dialled == [(PUBLIC, 443)]
    assert "SSL" in error.message
    assert not any("GET" in request for request in host.requests)


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """A file with the certificate, which this process trusts."""
    path = tmp_path / "pair.pem"
    path.write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


def speaks_tls(certificate, request):
    def script(connection):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        with context.wrap_socket(connection, server_side=True) as secured:
            request.append(secured.recv(65536))
            secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(FILE) + FILE)

    return script


def test_https_reaches_the_host_whose_certificate_is_trusted(certificate):
    request = []
    with hosting(speaks_tls(certificate, request), secure=True) as (host, fetch):
        assert fetch("https://images.example.org/x.png") == FILE
    assert host.dialled == [(PUBLIC, 443)]
    assert b"Host: images.example.org\r\n" in request[0]


@pytest.mark.parametrize("name", ["images.example.org", "other.example.org"])
def test_https_to_another_name_or_an_unknown_signer_is_refused(certificate, monkeypatch, tmp_path, name):
    if name == "images.example.org":
        (tmp_path / "nobody.pem").write_text("")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nobody.pem"))
    request = []
    with hosting(speaks_tls(certificate, request), secure=True, names=(name,)) as (_, fetch):
        error = refusal(fetch, f"https://{name}/")
    assert error.code == "image_fetch_failed"
    assert "SSLCertVerificationError" in error.message
    assert request == []
