"""Images inside the request: `data:` URLs, as clients really write them."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from api_schemas.errors import InvalidRequest

SCHEME = re.compile(r"\A\s*data:", re.IGNORECASE)
WHITESPACE = b" \t\r\n\f\v"
URL_SAFE = bytes.maketrans(b"-_", b"+/")


def is_data_url(url: str) -> bool:
    """Whether a URL carries its own bytes."""
    return SCHEME.match(url) is not None


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """Return the bytes of a base64 `data:` URL.

    Taken as well: any case, parameters, a wrong or missing media type (the file says what it is), the URL-safe
    alphabet, percent-encoding, white space, missing padding.

    Raises:
        InvalidRequest: `invalid_image_url` or `image_too_large`.
    """
    head, comma, payload = SCHEME.sub("", url, count=1).partition(",")
    if not comma:
        raise _invalid("it has no comma between its media type and its data")
    if "base64" not in (word.strip().lower() for word in head.split(";")):
        raise _invalid("its data are not base64")
    try:
        raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
    except UnicodeEncodeError as error:
        raise _invalid(f"its data have a {payload[error.start]!r}, which is not base64") from error
    raw = raw.translate(URL_SAFE, WHITESPACE).rstrip(b"=")
    size = len(raw) * 3 // 4
    if size > max_bytes:
        raise too_large(f"{size} bytes", max_bytes)
    try:
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as error:
        raise _invalid(f"its data are not base64: {error}") from error


def too_large(found: str, max_bytes: int) -> InvalidRequest:
    """Return the error of an image file with more bytes than are left."""
    message = (
        f"the image has {found} and {max_bytes} are left for it; all images of a request share "
        "MODEPRESS_MAX_IMAGE_BYTES: scale it down"
    )
    return InvalidRequest("image_too_large", message)


def _invalid(what: str) -> InvalidRequest:
    message = f"the data: URL cannot be read: {what}; send data:image/png;base64,…"
    return InvalidRequest("invalid_image_url", message)
