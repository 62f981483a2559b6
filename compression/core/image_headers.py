"""What an image file says of itself in its first bytes: format and size, read by hand before any decoder runs."""

import struct
from dataclasses import dataclass

from api_schemas.errors import InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
TAKEN = "PNG, JPEG, WebP and GIF (its first frame)"
MAX_ASPECT = 100  # processors scale the short side up to hundreds of pixels, the long side with it
MAX_SCANS = 32  # a progressive JPEG has about ten; each costs a pass over the whole picture
STANDALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # JPEG markers without a length
SIZE_FOLLOWS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START_OF_SCAN = 0xDA


@dataclass(frozen=True)
class ImageHeader:
    """Format (one of `FORMATS`) and size in pixels."""

    format: str
    width: int
    height: int


def read_header(data: bytes) -> ImageHeader:
    """Read format and size of an image file.

    Raises:
        InvalidRequest: `image_format_not_supported`, `image_damaged` or `image_too_complex`.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return ImageHeader("PNG", *_png_size(data))
        if data.startswith((b"GIF87a", b"GIF89a")):
            return ImageHeader("GIF", *struct.unpack_from("<HH", data, 6))
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return ImageHeader("WEBP", *_webp_size(data))
        if data.startswith(b"\xff\xd8"):
            return ImageHeader("JPEG", *_jpeg_size(data))
    except (struct.error, IndexError) as error:
        raise damaged("it ends inside its header") from error
    message = f"it begins with {data[:8]!r}, which is no image that is read here; give {TAKEN}"
    raise InvalidRequest("image_format_not_supported", message)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse pictures that would take too much memory.

    Raises:
        InvalidRequest: `image_damaged`, `image_too_many_pixels` or `image_too_narrow`.
    """
    if width < 1 or height < 1:
        raise damaged(f"it is {width} × {height} pixels")
    if width * height > max_pixels:
        message = (
            f"it is {width} × {height} = {width * height} pixels and at most {max_pixels} are decoded; scale it down"
        )
        raise InvalidRequest("image_too_many_pixels", message)
    if max(width, height) > MAX_ASPECT * min(width, height):
        message = f"it is {width} × {height} pixels; one side may be at most {MAX_ASPECT} times the other: crop it"
        raise InvalidRequest("image_too_narrow", message)


def damaged(what: str) -> InvalidRequest:
    """Return the error of a file that is no sound image."""
    return InvalidRequest("image_damaged", f"the image file is damaged: {what}; save it again and give that")


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise damaged("a PNG must begin with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        low, high, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return low + (high << 16) + 1, low_height + (high_height << 16) + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise damaged(f"a WebP with a first chunk {kind!r} that cannot be read")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    scans = data.count(bytes((0xFF, START_OF_SCAN)))
    if scans > MAX_SCANS:
        message = f"the JPEG has {scans} scans and at most {MAX_SCANS} are decoded; save it as a baseline JPEG"
        raise InvalidRequest("image_too_complex", message)
    at = 2
    while True:
        if data[at] != 0xFF:
            raise damaged(f"no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker in SIZE_FOLLOWS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker == START_OF_SCAN:
            raise damaged("a JPEG without a size")
        if marker == 0xFF:
            at += 1  # padding
        elif marker in STANDALONE:
            at += 2
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            at += 2 + max(2, length)
