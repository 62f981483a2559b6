"""Where images come from: data: URLs as clients write them; hosts that are listed and public; nothing else."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_schemas.errors import InvalidRequest
from job_store.outbound import is_public, system_resolver
from workers.inference.images.data_urls import decode_data_url, is_data_url
from workers.inference.images.fetching import Fetcher

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
