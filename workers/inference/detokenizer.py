"""Tokens to text, one at a time, without ever cutting a character in two."""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders put where bytes are not (yet) a character
MAX_HELD = 16  # tokens; a character has four bytes, so more than this will not become one


class Decodes(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Return the text of tokens."""
        ...


class Detokenizer:
    """Decodes a growing list of tokens through a short window, so that each token costs the same.

    Args:
        tokenizer: decodes a list of tokens.
        context: the end of the prompt. With it a first token that begins with a space keeps the space (continuing a
            text); without it the answer is decoded as a text of its own (a chat message).
    """

    def __init__(self, tokenizer: Decodes, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)
        self._read = len(self._window)  # tokens of the window whose text is out
        self._shown = self._decode(self._window)

    def add(self, token: int) -> str:
        """Take one token and return the text that is complete with it, often one word, sometimes nothing."""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._read
        if len(text) <= len(self._shown) or (text.endswith(REPLACEMENT) and held < MAX_HELD):
            return ""
        complete = text[len(self._shown) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = self._decode(self._window)
        return complete

    def flush(self) -> str:
        """Return what is still held at the end, without the beginning of a character that never came."""
        return self._decode(self._window)[len(self._shown) :].rstrip(REPLACEMENT)

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
