"""The bytes that single tokens stand for; a character may need several of them."""

import re
from typing import Any

BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece spells a byte
WORD_START = "\u2581"  # how sentencepiece spells a space


def _byte_signs() -> dict[str, int]:
    """Return the alphabet of byte-level vocabularies (GPT-2): visible bytes are themselves, others follow at 256."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_SIGNS = _byte_signs()


class Spelling:
    """Spells the tokens of a vocabulary.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text; special tokens add nothing."""
        if token in self._added:
            added = self._added[token]
            return b"" if added.special else str(added.content).encode()
        name = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._byte_level and all(sign in BYTE_SIGNS for sign in name):
            return bytes(BYTE_SIGNS[sign] for sign in name)
        if byte := BYTE_FALLBACK.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return str(name).replace(WORD_START, " ").encode()

    def text_of(self, token: int) -> str:
        """Return a token's text: its name where it has no bytes, `bytes:\\xf0\\x9f` where they are no characters."""
        spelled = self.bytes_of(token)
        if not spelled:
            return str(self._tokenizer.convert_ids_to_tokens(token) or f"<token {token}>")
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
