"""Log-probabilities of the tokens that stand in an answer's text, going out together with it.

They are the model's own: log-softmax of the logits as they come, before penalty, temperature and filters.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from workers.inference.detokenizer import REPLACEMENT
from workers.inference.spelling import Spelling
from workers.inference.tasks import Alternative, ScoredToken

FLOOR = -9999.0  # JSON has no infinity; OpenAI's value for what is all but impossible


@dataclass(frozen=True)
class _Group:
    """Tokens that became readable together, their bytes by the vocabulary, and the text they became."""

    tokens: tuple[ScoredToken, ...]
    spelled: tuple[bytes, ...]
    text: str

    def shown(self, start: int, text: str) -> list[ScoredToken]:
        """Return the tokens that stand in `text`, the beginning of the group's, which starts at character `start`."""
        bytes_shown = standing(self.spelled, text)
        count = len(self.tokens)
        while count and self.spelled[count - 1] and not bytes_shown[count - 1]:
            count -= 1
        before = [b"".join(bytes_shown[:at]).decode(errors="replace").rstrip(REPLACEMENT) for at in range(count)]
        return [
            replace(self.tokens[at], bytes=bytes_shown[at], offset=start + min(len(before[at]), len(text)))
            for at in range(count)
        ]


def standing(spelled: Sequence[bytes], text: str) -> list[bytes]:
    """Return what of each token's bytes stands in a text that their joined bytes begin with.

    Decoders may drop a first space. Where one writes what the vocabulary does not spell, the last token has all bytes.
    """
    joined = b"".join(spelled)
    for start in (0, 1) if joined.startswith(b" ") else (0,):
        for end in range(len(joined), start - 1, -1):
            if joined[start:end].decode(errors="replace") == text:
                return _cut(spelled, start, end)
    return [*(b"" for _ in spelled[1:]), text.encode()]


def _cut(spelled: Sequence[bytes], start: int, end: int) -> list[bytes]:
    pieces, at = [], 0
    for one in spelled:
        pieces.append(one[max(start - at, 0) : max(end - at, 0)])
        at += len(one)
    return pieces


class TokenScores:
    """Follows one answer from its tokens to the text that goes out.

    Args:
        spelling: of the vocabulary.
        alternatives: how many likeliest tokens are listed at each place.
    """

    def __init__(self, spelling: Spelling, alternatives: int) -> None:
        self._spelling = spelling
        self._alternatives = alternatives
        self._held: list[tuple[ScoredToken, bytes]] = []
        self._groups: deque[_Group] = deque()
        self._start = 0  # characters before the first group
        self._out = 0  # characters that went out

    def add(self, token: int, logits: torch.Tensor) -> None:
        """Take the next token and the logits [vocabulary] that it was picked from."""
        logs = torch.log_softmax(logits.double().cpu(), dim=-1)
        top = torch.topk(logs, min(self._alternatives, len(logs)))
        likeliest = tuple(self._alternative(int(other), float(log)) for log, other in zip(*top, strict=True))
        own = self._alternative(token, float(logs[token]))
        self._held.append((ScoredToken(own.token, own.logprob, own.bytes, likeliest), own.bytes))

    def complete(self, text: str) -> None:
        """The tokens since the last call became this text."""
        if self._held:
            tokens, spelled = zip(*self._held, strict=True)
            self._groups.append(_Group(tokens, spelled, text))
            self._held = []

    def release(self, text: str, *, ended: bool) -> tuple[ScoredToken, ...]:
        """Return the tokens that are wholly out with this text; at the end of the answer also those that are cut."""
        self._out += len(text)
        shown: list[ScoredToken] = []
        while self._groups:
            group, room = self._groups[0], self._out - self._start
            if room < len(group.text) and (not ended or room <= 0):
                break
            shown += group.shown(self._start, group.text[:room])
            self._start += len(group.text)
            self._groups.popleft()
        return tuple(shown)

    def _alternative(self, token: int, logprob: float) -> Alternative:
        spelled = self._spelling.bytes_of(token)
        return Alternative(self._spelling.text_of(token), max(logprob, FLOOR), spelled)
