"""Spending a budget of parameters where it costs least: one price list per part of each block.

Minimises the summed prices subject to the summed savings. On the lower convex hull of each list the optimum equalises
the marginal price per parameter (the Lagrangian's multiplier), which a bisection finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PriceList:
    """What one part costs at each width it may have.

    Attributes:
        widths: descending; the first is the original width.
        saved: parameters saved at each width; the first is 0.
        prices: loss at each width; the first is 0.
    """

    widths: tuple[int, ...]
    saved: tuple[int, ...]
    prices: tuple[float, ...]

    def best(self, price_per_parameter: float) -> int:
        """Index of the width that minimises price minus savings at this rate; the widest of equals."""
        return min(range(len(self.widths)), key=lambda at: (self.prices[at] - price_per_parameter * self.saved[at], at))


def spend(lists: Sequence[PriceList], parameters: int) -> tuple[int, ...]:
    """Choose a width for each list so that at least `parameters` are saved, as cheaply as the lists' hulls allow.

    Returns:
        One width per list. Where the rate at which the budget is met buys more than was asked, lists give back one
        step each, dearest first, as long as the budget stays met.

    Raises:
        ValueError: the narrowest widths together do not save as much.
    """
    if sum(one.saved[-1] for one in lists) < parameters:
        raise ValueError(f"the lists save at most {sum(one.saved[-1] for one in lists)}, not {parameters}")
    low, high = 0.0, 1.0
    while sum(one.saved[one.best(high)] for one in lists) < parameters:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if sum(one.saved[one.best(middle)] for one in lists) < parameters:
            low = middle
        else:
            high = middle
    chosen = [one.best(high) for one in lists]
    _give_back(lists, chosen, parameters)
    return tuple(one.widths[at] for one, at in zip(lists, chosen, strict=True))


def cheapest_curve(lists: Sequence[PriceList]) -> tuple[tuple[int, float], ...]:
    """Parameters saved and the least summed price, from nothing to all that the lists can save.

    The steps of all lists' lower convex hulls in the order of their price per parameter: what `spend` chooses from,
    all at once.
    """
    steps: list[tuple[float, int, float]] = []
    for one in lists:
        at, end = 0, len(one.widths) - 1
        while at < end:
            slopes = {
                to: (one.prices[to] - one.prices[at]) / (one.saved[to] - one.saved[at]) for to in range(at + 1, end + 1)
            }
            to = min(slopes, key=lambda index: (slopes[index], -index))
            steps.append((slopes[to], one.saved[to] - one.saved[at], one.prices[to] - one.prices[at]))
            at = to
    curve = [(0, 0.0)]
    for _, saved, price in sorted(steps):
        curve.append((curve[-1][0] + saved, curve[-1][1] + price))
    return tuple(curve)


def _give_back(lists: Sequence[PriceList], chosen: list[int], parameters: int) -> None:
    """Undo steps that the budget does not need, the dearest per parameter first, in place."""
    spare = sum(one.saved[at] for one, at in zip(lists, chosen, strict=True)) - parameters
    while True:
        steps = [
            ((one.prices[at] - one.prices[at - 1]) / max(1, one.saved[at] - one.saved[at - 1]), index)
            for index, (one, at) in enumerate(zip(lists, chosen, strict=True))
            if at > 0 and one.saved[at] - one.saved[at - 1] <= spare
        ]
        if not steps:
            return
        index = max(steps)[1]
        spare -= lists[index].saved[chosen[index]] - lists[index].saved[chosen[index] - 1]
        chosen[index] -= 1
