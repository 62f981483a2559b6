"""Walks the header of a GGUF file before a reader that trusts its counts is let near it.

The reader of the package `gguf` makes one object per element that a file claims to have, so a file of forty bytes
can ask for all memory. Here every count is weighed against the bytes that are left, and nothing is kept.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from api_schemas.errors import InvalidCheckpoint

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 4_000_000  # of all arrays together: the reader makes an object of each
LEAST_PAIR_BYTES = 8 + 4 + 1  # an empty name, a kind, one byte
LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
MAX_NUMBERS = 2**48  # of one tensor, far beyond any model: keeps products out of the range where numpy wraps around


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose header claims what its bytes cannot hold.

    Raises:
        InvalidCheckpoint: `invalid_gguf`; `param` is `source`.
    """
    with path.open("rb") as file:
        try:
            _Walk(file, path.stat().st_size).run()
        except (_Unsound, struct.error) as error:
            what = "it ends inside its header" if isinstance(error, struct.error) else str(error)
            message = f"{path.name} is no sound GGUF file: {what}; download or convert it again"
            raise InvalidCheckpoint("invalid_gguf", message, "source") from error


class _Unsound(Exception):
    """What is wrong, in words."""


@dataclass
class _Walk:
    file: BinaryIO
    size: int
    elements: int = 0

    def run(self) -> None:
        if self.file.read(len(MAGIC)) != MAGIC:
            raise _Unsound(f"it does not begin with {MAGIC!r}")
        (version,) = self._unpack("<I")
        if version not in VERSIONS:
            raise _Unsound(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are read")
        tensors, pairs = self._unpack("<QQ")
        self._fits(pairs, LEAST_PAIR_BYTES, "keys")
        self._fits(tensors, LEAST_TENSOR_BYTES, "tensors")
        for _ in range(pairs):
            self._text()
            self._value(*self._unpack("<I"))
        for _ in range(tensors):
            self._tensor()

    def _value(self, kind: int) -> None:
        if kind == STRING:
            self._text()
        elif kind == ARRAY:
            inner, count = self._unpack("<IQ")
            if inner == ARRAY:
                raise _Unsound("it has arrays in arrays")
            self._fits(count, SCALAR_BYTES.get(inner, 8), "elements in one array")
            self.elements += count
            if self.elements > MAX_ELEMENTS:
                raise _Unsound(f"its arrays hold more than {MAX_ELEMENTS} elements")
            if inner == STRING:
                for _ in range(count):
                    self._text()
            else:
                self._skip(count * _scalar_bytes(inner))
        else:
            self._skip(_scalar_bytes(kind))

    def _tensor(self) -> None:
        self._text()
        (dimensions,) = self._unpack("<I")
        if dimensions > MAX_DIMENSIONS:
            raise _Unsound(f"a tensor has {dimensions} dimensions, and {MAX_DIMENSIONS} are the most")
        shape = self._unpack(f"<{dimensions}Q")
        if math.prod(shape) > MAX_NUMBERS:
            raise _Unsound(f"a tensor has the shape {shape}")
        _, offset = self._unpack("<IQ")
        if offset > self.size:
            raise _Unsound(f"a tensor begins at byte {offset} of {self.size}")

    def _text(self) -> None:
        (length,) = self._unpack("<Q")
        self._fits(length, 1, "bytes in one text")
        self._skip(length)

    def _unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))

    def _skip(self, count: int) -> None:
        if self.file.seek(count, 1) > self.size:
            raise _Unsound("it ends inside its header")

    def _fits(self, count: int, least: int, what: str) -> None:
        left = self.size - self.file.tell()
        if count * least > left:
            raise _Unsound(f"it claims {count} {what}, and {left} bytes are left")


def _scalar_bytes(kind: int) -> int:
    if kind not in SCALAR_BYTES:
        raise _Unsound(f"it has a value of the unknown kind {kind}")
    return SCALAR_BYTES[kind]
