"""From the messages of a request to the files of its images, checked but not decoded yet.

This happens before the request waits for its turn: files are small, pixels are not (`compression.core.image_decoding`).
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from api_schemas.errors import InvalidRequest
from api_schemas.inference import ImagePart, Message
from compression.core.image_decoding import decode
from compression.core.image_headers import check_size, read_header
from job_store.settings import Settings
from workers.inference.images.addresses import fetch_failed
from workers.inference.images.data_urls import decode_data_url, is_data_url
from workers.inference.images.fetching import LATE, Fetcher
from workers.inference.queueing import WaitingLine

FETCHING = 4  # requests that fetch at once


@dataclass(frozen=True)
class ImageFile:
    """One image of a request.

    Attributes:
        place: where in the request it stands.
        data: its file.
        max_pixels: it may have.
    """

    place: str
    data: bytes
    max_pixels: int

    def decode(self) -> Image.Image:
        """Return its pixels. Raises InvalidRequest as `decode` does, with the place."""
        with _placed(self.place):
            return decode(self.data, self.max_pixels)


def image_parts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return place and URL of each image, in the order in which the model will see them."""
    return [
        (f"messages.{index}.content.{position}", part.image_url.url)
        for index, message in enumerate(messages)
        if not isinstance(message.content, str)
        for position, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


class ImageReader:
    """Reads image files out of requests or from allowed hosts, in threads of its own."""

    def __init__(self, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self._settings = settings
        self._fetcher = fetcher or Fetcher(settings.allowed_image_hosts)
        self._line = WaitingLine(settings.inference_max_waiting, FETCHING)
        self._threads = ThreadPoolExecutor(FETCHING, thread_name_prefix="fetch")

    async def read(self, parts: Sequence[tuple[str, str]]) -> tuple[ImageFile, ...]:
        """Return the files of a request's images.

        Args:
            parts: as `image_parts` returns them.

        Raises:
            InvalidRequest: `too_many_images`, `invalid_image_url`, `image_too_large`, what `Fetcher.fetch`,
                `read_header` and `check_size` raise; param is the image's place.
            QueueFull: too many requests fetch images already.
        """
        settings = self._settings
        if len(parts) > settings.max_images:
            message = (
                f"messages have {len(parts)} images and this server reads at most {settings.max_images} in a request "
                "(MODEPRESS_MAX_IMAGES); send fewer"
            )
            raise InvalidRequest("too_many_images", message, "messages")
        if all(is_data_url(url) for _, url in parts):
            return await asyncio.to_thread(self._files, parts)
        async with self._line.turn(_admitted):
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._files, parts)
            try:
                return await asyncio.wait_for(work, settings.image_fetch_seconds + 1)
            except TimeoutError as error:  # the system's resolver has a patience of its own
                late = fetch_failed("its host", LATE)
                raise InvalidRequest(late.code, late.message, "messages") from error

    def close(self) -> None:
        """Wait for no fetch; each ends by its deadline."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _files(self, parts: Sequence[tuple[str, str]]) -> tuple[ImageFile, ...]:
        deadline = time.monotonic() + self._settings.image_fetch_seconds
        left = self._settings.max_image_bytes
        files = []
        for place, url in parts:
            with _placed(place):
                data = decode_data_url(url, left) if is_data_url(url) else self._fetcher.fetch(url, left, deadline)
                header = read_header(data)
                check_size(header.width, header.height, self._settings.max_image_pixels)
            left -= len(data)
            files.append(ImageFile(place, data, self._settings.max_image_pixels))
        return tuple(files)


def _admitted() -> None:
    """A place in the line of fetches is not counted: the request itself is, once it waits for the model."""


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Name the image in what is refused."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(error.code, f"{place}: {error.message}", place) from error
