"""Image files: what is decoded, and what hostile ones lead to, in bounded time and memory."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from api_schemas.errors import InvalidRequest
from compression.core.image_decoding import decode
from compression.core.image_headers import MAX_SCANS, ImageHeader, read_header
from tests.tiny_vision_models import encoded, picture

PIXELS = 10**6
FORMS = {
    "PNG": {},
    "JPEG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
}


def refusal(data, max_pixels=PIXELS):
    with pytest.raises(InvalidRequest) as caught:
        decode(data, max_pixels)
    assert caught.value.status == 400
    return caught.value.code


def outcome(data):
    """The picture and no code, or no picture and why."""
    try:
        return decode(data, PIXELS), None
    except InvalidRequest as error:
        return None, error.code


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", *more):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def webp(kind, payload):
    body = b"WEBP" + kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_formats_and_modes(form, mode):
    if form in ("JPEG",) and mode in ("P", "RGBA", "LA"):
        pytest.skip("JPEG has no such mode")
    original = picture(3, 37, 23).convert(mode)
    image = decode(encoded(original, form, **FORMS[form]), PIXELS)
    assert (image.mode, image.size) == ("RGB", (37, 23))
    if form in ("PNG", "WEBP"):
        assert (pixels(image) == pixels(original.convert("RGBA").convert("RGB"))).all()


@pytest.mark.parametrize("form", FORMS)
@given(width=st.integers(1, 90), height=st.integers(1, 90))
@settings(max_examples=15, deadline=None)
def test_the_header_says_what_the_decoder_will(form, width, height):
    options = (
        [FORMS[form]] + ([{"quality": 50}] if form == "WEBP" else []) + ([{"progressive": True}] * (form == "JPEG"))
    )
    for chosen in options:
        data = encoded(Image.new("RGB", (width, height), "red"), form, **chosen)
        assert read_header(data) == ImageHeader(form, width, height)
        assert decode(data, PIXELS).size == (width, height)


def test_header_of_an_animated_or_transparent_webp():
    frames = [picture(seed, 30, 20) for seed in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert read_header(data) == ImageHeader("WEBP", 30, 20)
    assert (pixels(decode(data, PIXELS)) == pixels(frames[0])).all()


def test_of_a_moving_gif_the_first_frame_is_read():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, PIXELS).getpixel((5, 5)) == (255, 0, 0)


def test_exif_turns_the_picture_as_transformers_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encoded(picture(1, 40, 20), "JPEG", exif=exif, quality=100)
    assert decode(data, PIXELS).size == (20, 40)


def test_grey_of_sixteen_bits_keeps_its_upper_half():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = decode(encoded(Image.fromarray(values)), PIXELS)
    assert (pixels(image)[..., 0] == values >> 8).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_truncation_is_refused_or_complete(form):
    original = encoded(picture(4, 24, 18), form, **FORMS[form])
    whole = pixels(decode(original, PIXELS))
    for end in range(len(original)):
        image, code = outcome(original[:end])
        assert code in (None, "image_damaged", "image_format_not_supported")
        if image is not None:  # only a trailer was missing
            assert (pixels(image) == whole).all()
            assert len(original) - end < 24


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_changed_bytes_give_a_picture_or_a_name(form, data):
    original = bytearray(encoded(picture(5, 24, 18), form, **FORMS[form]))
    for _ in range(data.draw(st.integers(1, 6))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    image, code = outcome(bytes(original))
    assert code.startswith("image_") if image is None else image.mode == "RGB"


@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF"]),
)
@settings(deadline=None)
def test_noise_is_refused_by_name(data, start):
    assert refusal(start + data).startswith("image_")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"BM" + bytes(60),
        b"II*\0" + bytes(60),
        b"\0\0\0 ftypavif",
    ],
    ids=["nothing", "svg", "pdf", "bmp", "tiff", "avif"],
)
def test_other_formats_never_reach_a_decoder(data):
    assert refusal(data) == "image_format_not_supported"


BOMBS = {
    "png": png(60_000, 60_000, bytes(60_001)),
    "png with a thin file": png(2**31 - 1, 2**31 - 1),
    "gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(40),
    "webp extended": webp(b"VP8X", bytes(4) + b"\xff\xff\xff\xff\xff\xff"),
    "webp lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", 0x0FFFFFFF)),
    "webp lossy": webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)),
    "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65500, 65500) + bytes(20),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header_without_memory(name):
    tracemalloc.start()
    try:
        assert refusal(BOMBS[name]) == "image_too_many_pixels"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_limit_is_exact():
    data = encoded(Image.new("L", (100, 50)))
    assert decode(data, 5000).size == (100, 50)
    assert refusal(data, 4999) == "image_too_many_pixels"


def test_a_gif_whose_frame_is_larger_than_its_screen():
    data = bytearray(encoded(Image.new("RGB", (300, 300), "red"), "GIF"))
    struct.pack_into("<HH", data, 6, 10, 10)
    assert refusal(bytes(data), 1000) == "image_too_many_pixels"


@pytest.mark.parametrize("size", [(1, 101), (101, 1)])
def test_slivers_that_processors_would_blow_up(size):
    assert refusal(encoded(Image.new("L", size))) == "image_too_narrow"


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_pictures_without_pixels(size):
    assert refusal(png(*size)) == "image_damaged"


def test_a_jpeg_of_very_many_scans():
    data = encoded(picture(1), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    end = data.index(b"\xff\xda", start + 2)
    assert refusal(data[:start] + data[start:end] * (MAX_SCANS + 1) + data[start:]) == "image_too_complex"


def test_a_png_whose_text_unpacks_to_very_much():
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000)))
    assert refusal(png(8, 8, bytes(72), text)) == "image_damaged"


def test_a_jpeg_without_a_size_or_with_endless_padding():
    assert refusal(b"\xff\xd8\xff\xda\x00\x02" + bytes(50)) == "image_damaged"
    assert refusal(b"\xff\xd8" + b"\xff" * 100_000) == "image_damaged"
