"""Windows of image-text pairs: every window is full, and no image is cut by its end.

Rows stand one after the other as in a text, with the end-of-text token between them. Where a window ends inside a row's
text, the rest waits. An image that does not fit into what is left of a window leaves that room to waiting text; where
too little waits, to the row's own, and is itself left out. So no position is padding, and no token is used twice.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from api_schemas.calibration import Calibration
from api_schemas.errors import InvalidCalibration
from compression.core.picture_encoder import Encoded, PictureEncoder
from compression.core.picture_rows import ROLE, PictureRow
from compression.core.streamed_model import StreamedModel
from compression.core.text_rows import text_sha256
from compression.core.texts import IMAGE, Windows, text_use


def seeing(model: StreamedModel, windows: Windows, part: slice) -> StreamedModel:
    """The model, which embeds `windows.tokens[part]` with their images where there are any."""
    return model if windows.pictures is None else _SeeingModel(model, windows, part)


class _SeeingModel(StreamedModel):
    """A model that embeds some windows, images and all, where it is asked to embed their tokens."""

    def __init__(self, model: StreamedModel, windows: Windows, part: slice) -> None:
        """Be `model`, and know `windows.tokens[part]`."""
        self.__dict__.update(model.__dict__)
        self._tokens, self._hidden = windows.tokens[part], windows.embed(model, part)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states `[windows, tokens, hidden]` of these very windows."""
        if not torch.equal(tokens, self._tokens):
            raise ValueError("these are other windows than those whose images are known")
        return self._hidden.clone()


@dataclass(frozen=True)
class _Picture:
    """An image in a window: its states at block 0 and its file's digest."""

    states: Tensor
    digest: str


@dataclass
class Filling:
    """Windows of `length` tokens under construction; `separator` stands between rows."""

    length: int
    separator: list[int]
    full: list[list[int]] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    pictures: list[_Picture] = field(default_factory=list)
    open_pictures: list[_Picture] = field(default_factory=list)
    left_out: int = 0

    @property
    def held(self) -> int:
        """Tokens that were read and not left out."""
        return len(self.full) * self.length + len(self.open) + len(self.waiting)

    def add_text(self, ids: list[int]) -> None:
        """A row of text; what does not fit into the open window waits."""
        ids = self._between() + ids
        room = self.length - len(self.open)
        self._append(ids[:room])
        self.waiting += ids[room:]

    def add_picture(self, row: Encoded, digest: str, where: str) -> None:
        """A row with an image.

        Raises:
            InvalidCalibration: `image_too_long` when no window can hold it.
        """
        end = row.places[-1] + 1
        if end > self.length:
            raise InvalidCalibration(
                "image_too_long",
                f"{where}: the image ends {end} tokens into its row, and a window has {self.length}; raise "
                "calibration.sequence_length",
                "calibration.sequence_length",
            )
        if not self._fits(end):
            self.fill_gap()
        if not self._fits(end):
            self.left_out += 1
            self.add_text(row.tokens[: row.places[0]] + row.tokens[end:])
            return
        places = set(row.places)
        self.open_pictures.append(_Picture(row.states, digest))
        self._append(self._between() + [IMAGE if at in places else row.tokens[at] for at in range(end)])
        rest, room = row.tokens[end:], self.length - len(self.open) if self.open else 0
        self._append(rest[:room])
        self.waiting += rest[room:]

    def fill_gap(self) -> None:
        """Waiting text into the open window, as much as there is."""
        room = self.length - len(self.open)
        taken, self.waiting = self.waiting[:room], self.waiting[room:]
        self._append(taken)

    def _between(self) -> list[int]:
        return self.separator if self.open else []

    def _fits(self, end: int) -> bool:
        return len(self._between()) + end <= self.length - len(self.open)

    def _append(self, ids: list[int]) -> None:
        self.open = self.open + ids
        if len(self.open) == self.length:
            self.full.append(self.open)
            self.pictures += self.open_pictures
            self.open, self.open_pictures = [], []


def load_pictures(source: Calibration, wanted: int, rows: Iterable[PictureRow], encoder: PictureEncoder) -> Windows:
    """Cut windows from rows of images and text; reading stops once there are enough.

    Args:
        source: the window's length, and what the report names.
        wanted: windows asked for; fewer are returned where the rows are fewer, never none.
        rows: in order.
        encoder: of the model.

    Raises:
        InvalidCalibration: `text_too_short` when there is not one full window, `no_images` when none of the windows
            has an image, and what reading and encoding a row raise.
    """
    tokenizer, length = encoder.processor.tokenizer, source.sequence_length
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    filling, read = Filling(length, separator), list[str]()
    for row in rows:
        if row.image is None:
            filling.add_text(list(tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"]))
        else:
            filling.add_picture(encoder.encode(row), row.digest, row.where)
        read += [row.text, row.digest]
        if filling.held >= wanted * length:
            break
    while len(filling.waiting) >= length - len(filling.open):
        filling.fill_gap()
    return _windows(source, wanted, filling, text_sha256(read))


def _windows(source: Calibration, wanted: int, filling: Filling, text_hash: str) -> Windows:
    if not filling.full:
        raise InvalidCalibration(
            "text_too_short",
            f"{ROLE}: the rows have {filling.held} tokens, which fill no window of {filling.length}; give more rows or "
            "a smaller sequence_length",
            f"{ROLE}.sequence_length",
        )
    tokens = torch.tensor(filling.full[:wanted], dtype=torch.int64)
    count = int((tokens == IMAGE).sum())
    if not count:
        raise InvalidCalibration(
            "no_images",
            f"calibration.image_field {source.image_field!r}: none of the rows that were used has an image; name the "
            "right key, or leave image_field out",
            "calibration.image_field",
        )
    states = torch.cat([picture.states for picture in filling.pictures])[:count]
    images = _whole_within(filling.pictures, count)
    use = text_use(source, tokens, wanted, ROLE)
    digest = hashlib.sha256(use.sha256.encode() + "".join(one.digest for one in images).encode()).hexdigest()
    seen = {"sha256": digest, "images": len(images), "image_tokens": count, "images_left_out": filling.left_out}
    return Windows(tokens, use.model_copy(update=seen), text_hash, states)


def _whole_within(pictures: list[_Picture], tokens: int) -> list[_Picture]:
    """The first pictures, which have so many tokens together."""
    found: list[_Picture] = []
    for picture in pictures:
        if tokens <= 0:
            break
        found.append(picture)
        tokens -= len(picture.states)
    return found
