"""Where images come from: data: URLs as clients write them; hosts that are listed and public; nothing else."""

import base64
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_schemas.errors import InvalidRequest
from workers.inference.images.addresses import is_public, system_resolver
from workers.inference.images.data_urls import decode_data_url, is_data_url
from workers.inference.images.fetching import MAX_REDIRECTS, Fetcher

PUBLIC, ALSO_PUBLIC = "93.184.215.14", "2606:4700:4700::1111"
FILE = bytes(range(256)) * 3 + b"\xff\xfe\xfb\xf0\xff"


def refusal(function, *arguments):
    with pytest.raises(InvalidRequest) as caught:
        function(*arguments)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:IMAGE/PNG;Base64,",
        "  data:image/png;charset=utf-8;name=a.png;base64,",
        "data:;base64,",
        "data:image/jpg; base64 ,",
        "data:base64,",
    ],
)
@pytest.mark.parametrize(
    "spell",
    [
        lambda text: text,
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        lambda text: "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n",
        lambda text: text + "==",
    ],
    ids=["plain", "unpadded", "url-safe", "percent", "folded", "overpadded"],
)
def test_data_urls_in_every_spelling(head, spell):
    url = head + spell(base64.b64encode(FILE).decode())
    assert is_data_url(url)
    assert decode_data_url(url, len(FILE)) == FILE


@given(st.binary(max_size=300))
def test_any_bytes_come_back(data):
    assert decode_data_url(f"data:image/png;base64,{base64.b64encode(data).decode()}", 300) == data


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png,iVBORw0KGgo=", "not base64"),
        ("data:image/png;base64,iVBO*w0KGgo=", "not base64"),
        ("data:image/png;base64,iVBOR", "not base64"),
        ("data:image/png;base64,iVBÖRw0K", "'Ö'"),
        ("data:image/png;base64,iV=BORw0", "not base64"),
    ],
)
def test_broken_data_urls(url, named):
    error = refusal(decode_data_url, url, 1000)
    assert error.code == "invalid_image_url"
    assert named in error.message


def test_a_large_data_url_is_refused_before_it_is_decoded():
    error = refusal(decode_data_url, "data:;base64," + "A" * 4000, 2999)
    assert error.code == "image_too_large"
    assert "3000" in error.message
    assert "MODEPRESS_MAX_IMAGE_BYTES" in error.message


NOT_PUBLIC = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0",  # noqa: S104
    "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0",
    "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
    "2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:db8::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_the_public_internet(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, ALSO_PUBLIC, "::ffff:93.184.215.14", "64:ff9b::5db8:d70e"])
def test_public_addresses(address):
    assert is_public(address)


INSIDE = [
    "http://127.0.0.1/x.png",
    "http://127.0.0.1:22/",
    "http://[::1]/x.png",
    "http://[::ffff:7f00:1]/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://localhost/",
    "https://LOCALHOST./x.png",
]


@pytest.mark.parametrize("url", INSIDE)
def test_nothing_is_fetched_from_hosts_that_are_not_listed(url):
    def never(*_):
        raise AssertionError("was looked up")

    error = refusal(Fetcher(frozenset({"images.example.org"}), resolve=never, dial=never).fetch, url, 100, 1e18)
    assert error.code == "image_host_not_allowed"
    assert "MODEPRESS_IMAGE_HOSTS" in error.message
    assert refusal(Fetcher(frozenset()).fetch, url, 100, 1e18).code == "image_host_not_allowed"


@pytest.mark.parametrize("url", INSIDE)
def test_a_listed_name_that_is_inside_is_refused_too(url):
    """With this system's own resolver: whatever spelling of an address it understands."""
    host = url.split("/")[2].removesuffix(":22").strip("[]").rstrip(".").lower()
    listed = frozenset({host, f"{host}:22"})
    error = refusal(Fetcher(listed, resolve=system_resolver, dial=no_connection).fetch, url, 100, 1e18)
    assert error.code in ("image_address_not_allowed", "image_fetch_failed")
    if "does not resolve" not in error.message:
        assert error.code == "image_address_not_allowed"


def no_connection(*_):
    raise AssertionError("was connected to")


@pytest.mark.parametrize("addresses", [["10.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1"], ["::ffff:192.168.0.1", PUBLIC]])
def test_one_inside_address_among_several_is_enough(addresses):
    fetcher = Fetcher(frozenset({"images.example.org"}), resolve=lambda *_: addresses, dial=no_connection)
    error = refusal(fetcher.fetch, "https://images.example.org/x.png", 100, 1e18)
    assert error.code == "image_address_not_allowed"
    assert "10.0.0.1" not in error.message  # what is inside stays inside


@pytest.mark.parametrize(
    "url",
    [
        "ftp://images.example.org/x.png",
        "file:///etc/passwd",
        "gopher://images.example.org/",
        "images.example.org/x.png",
        "http://",
        "http://user:secret@images.example.org/x.png",
        "http://images.example.org@127.0.0.1/",
        "http://images.example.org:99999/",
        "http://images.example.org:x/",
        "http://[::1/",
        "http://images.example.org/a b",
        "http://images.example.org/\r\nX-Injected: 1",
        "http://images..example.org/",
    ],
)
def test_urls_that_cannot_be_used(url):
    fetcher = Fetcher(frozenset({"images.example.org"}), resolve=lambda *_: [PUBLIC], dial=no_connection)
    error = refusal(fetcher.fetch, url, 100, 1e18)
    assert error.code == "invalid_image_url"
    assert "secret" not in error.message.replace(url[:80], "")


def test_another_port_must_be_listed():
    fetcher = Fetcher(frozenset({"images.example.org"}), resolve=lambda *_: [PUBLIC], dial=no_connection)
    assert refusal(fetcher.fetch, "http://images.example.org:8080/", 9, 1e18).code == "image_host_not_allowed"


class Host:
    """A real server on loopback that answers each connection with the next of its scripts; a dial leads there."""

    def __init__(self, scripts):
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
def hosting(*scripts, names=("images.example.org",), resolve=lambda *_: [PUBLIC], seconds=20.0, limit=10_000):
    host = Host(scripts)
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
    def drip(connection):
        connection.sendall(start)
        for _ in range(400):
            connection.sendall(b"a")
            time.sleep(0.05)

    with hosting(drip, seconds=0.5) as (_, fetch):
        error = refusal(fetch, "http://images.example.org/")
    assert error.code == "image_fetch_failed"
    assert "time" in error.message


def test_https_is_never_spoken_in_the_clear():
    with hosting(sends("200 OK", FILE)) as (host, fetch):
        error = refusal(fetch, "https://images.example.org/")
    assert error.code == "image_fetch_failed"
    assert host.dialled == [(PUBLIC, 443)]
    assert "SSL" in error.message
    assert not any("GET" in request for request in host.requests)
