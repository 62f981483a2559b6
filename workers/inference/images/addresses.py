"""Which addresses images may be fetched from: names on the operator's list that resolve to the public internet."""

from api_schemas.errors import InvalidRequest
from job_store.outbound import SHOWN, BadUrl, Resolve, Target, Unresolved, is_listed, is_public, look_up, split_url


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
    try:
        scheme, host, port, path = split_url(url)
    except BadUrl as error:
        raise _invalid(url, f"{error}") from error
    if not is_listed(scheme, host, port, hosts):
        message = (
            f"images are not fetched from {host[:SHOWN]!r} (port {port}); send the image as a data: URL, or let the "
            "operator add the host to MODEPRESS_IMAGE_HOSTS"
        )
        raise InvalidRequest("image_host_not_allowed", message)
    try:
        addresses = look_up(host, port, resolve)
    except Unresolved as error:
        raise fetch_failed(host, f"{error}") from error
    if not all(map(is_public, addresses)):
        message = f"{host!r} resolves to an address that is not on the public internet; send the image as a data: URL"
        raise InvalidRequest("image_address_not_allowed", message)
    return Target(scheme == "https", host, port, addresses, path)


def fetch_failed(host: str, what: str) -> InvalidRequest:
    """Return the error of an allowed host that did not give an image."""
    message = f"no image came from {host!r}: {what}; send the image as a data: URL"
    return InvalidRequest("image_fetch_failed", message)


def _invalid(url: str, what: str) -> InvalidRequest:
    message = f"image_url.url {url[:SHOWN]!r} cannot be used: {what}; send data:image/png;base64,… or https://host/path"
    return InvalidRequest("invalid_image_url", message)
