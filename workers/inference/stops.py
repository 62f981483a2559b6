"""Stop strings in a stream: text goes out as soon as it can no longer be part of a stop string."""

from collections.abc import Sequence

from api_schemas.errors import InvalidRequest
from api_schemas.inference import Stop


def stop_strings(stop: Stop) -> tuple[str, ...]:
    """Return a request's stop strings.

    Raises:
        InvalidRequest: `invalid_stop`, for an empty string.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in strings:
        raise InvalidRequest("invalid_stop", "stop holds an empty string, which would stop at once; remove it", "stop")
    return strings


class StopFilter:
    """Cuts a stream of text before the first stop string to become complete.

    Where several become complete with the same character, the longest wins. What comes out depends on the text alone,
    not on how it is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that may go out, and whether a stop string was met."""
        text = self._held + text
        hits = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)[1]], True
        held = self._undecided(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
