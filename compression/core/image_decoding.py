"""From an image file to pixels. Pillow decodes four formats, one frame, after the header was found harmless."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from api_schemas.errors import InvalidRequest
from compression.core.image_headers import FORMATS, check_size, damaged, read_header

SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Return an image file's first frame in RGB, turned the way its EXIF data say.

    Args:
        data: the file.
        max_pixels: width × height at most.

    Raises:
        InvalidRequest: `image_format_not_supported`, `image_damaged`, `image_too_complex`, `image_too_many_pixels` or
            `image_too_narrow`.
    """
    header = read_header(data)
    check_size(header.width, header.height, max_pixels)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(image.width, image.height, max_pixels)  # a GIF's frame may be larger than its screen
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's decoders name no common base for what a broken file can raise
        raise damaged(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """As transformers reads images: transparency is dropped, not blended. Grey of 16 bits keeps its upper 8."""
    if image.mode in SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
