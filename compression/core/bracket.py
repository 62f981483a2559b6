"""Looking for the largest removal whose loss stays within a limit, by few and costly measurements.

Removals are counted in whole steps k. The loss is thought to rise with k as a known curve times an unknown factor: the
first measurement fixes the factor, and once one measurement lies on each side of the limit the curve is bent to pass
through both. What is measured decides; the curve only says where to measure next. Measured losses need not rise with k:
what failed below a success is passed over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

AIM = 0.95  # of the limit: a measurement just below it is worth more than one just above
ENOUGH = 0.9  # a success that uses so much of the limit ends the search
MARGIN = 10  # a measurement lies at least this fraction of the interval away from its ends
GROWTH = 2  # without a failure so far, no measurement lies further out than this multiple of the largest success


@dataclass(frozen=True)
class Measured:
    """A removal that was tried.

    Attributes:
        steps: how much was removed; 0 is the original.
        loss: by how much it is worse, in the unit of the limit; may be negative.
    """

    steps: int
    loss: float


@dataclass(frozen=True)
class Search:
    """What is looked for: the largest number of steps whose loss is at most the limit.

    Attributes:
        limit: of the loss, positive.
        most: the largest number of steps that can be tried.
        curve: loss expected at a number of steps, up to a factor; 0 at 0 and never falling.
        factor: what the curve is multiplied by before anything was measured.
    """

    limit: float
    most: int
    curve: Callable[[int], float]
    factor: float

    def success(self, points: Sequence[Measured]) -> Measured:
        """The largest removal within the limit; the original where none is."""
        return max((point for point in points if point.loss <= self.limit), key=lambda p: p.steps, default=ORIGINAL)

    def failure(self, points: Sequence[Measured]) -> Measured | None:
        """The smallest removal beyond the limit that is larger than the best success."""
        low = self.success(points).steps
        beyond = (point for point in points if point.loss > self.limit and point.steps > low)
        return min(beyond, key=lambda point: point.steps, default=None)

    def expected(self, points: Sequence[Measured], steps: int) -> float:
        """The loss that the measurements and the curve let expect."""
        low, high = self.success(points), self.failure(points)
        start = self.curve(low.steps)
        if high is None:
            known = low.loss > 0 and start > 0
            return (low.loss / start if known else self.factor) * self.curve(steps)
        share = (self.curve(steps) - start) / max(self.curve(high.steps) - start, 1e-300)
        return low.loss + share * (high.loss - low.loss)

    def next(self, points: Sequence[Measured]) -> int | None:
        """Where to measure next; None where nothing is left to learn or the best success is good enough."""
        low, high = self.success(points), self.failure(points)
        if low.loss >= ENOUGH * self.limit or low.steps == self.most:
            return None
        if high is None:
            first, last = low.steps + 1, min(self.most, GROWTH * low.steps if low.steps else self.most)
            if low.steps and low.loss <= 0:
                first = last  # nothing was lost yet, so nothing is known of the factor
        else:
            margin = max(1, (high.steps - low.steps) // MARGIN)
            first, last = low.steps + margin, high.steps - margin
        if first > last:
            first = last = low.steps + 1
        if high is not None and first >= high.steps:
            return None
        return self._furthest(points, first, last)

    def _furthest(self, points: Sequence[Measured], first: int, last: int) -> int:
        """The largest number of steps in the range that is expected to stay within the aim; else the first."""
        while first < last:
            middle = (first + last + 1) // 2
            if self.expected(points, middle) <= AIM * self.limit:
                first = middle
            else:
                last = middle - 1
        return first


ORIGINAL = Measured(0, 0.0)
