"""The search for the largest removal within a limit: few measurements, and the measured decides, not the expected."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.core.bracket import ENOUGH, Measured, Search


def searched(search: Search, truth: Callable[[int], float], trials: int) -> list[Measured]:
    points: list[Measured] = []
    while len(points) < trials and (steps := search.next(points)) is not None:
        assert 0 < steps <= search.most
        assert steps not in [point.steps for point in points]
        points.append(Measured(steps, truth(steps)))
    return points


@given(
    most=st.integers(1, 400),
    limit=st.floats(0.001, 5.0),
    power=st.floats(0.3, 6.0),
    believed=st.floats(0.3, 6.0),
    scale=st.floats(1e-4, 1e4),
    factor=st.floats(0.01, 100.0),
)
@settings(deadline=None, max_examples=300)
def test_with_trials_enough_it_ends_at_the_best_that_rising_losses_allow(
    most: int, limit: float, power: float, believed: float, scale: float, factor: float
) -> None:
    def truth(steps: int) -> float:
        return scale * (steps / most) ** power

    search = Search(limit, most, lambda steps: (steps / most) ** believed, factor)
    points = searched(search, truth, 10_000)
    best = search.success(points)
    reachable = max((steps for steps in range(most + 1) if truth(steps) <= limit), default=0)
    assert best.loss <= limit
    assert best.steps == reachable or best.loss >= ENOUGH * limit
    assert len(points) <= 60


@given(
    most=st.integers(1, 60),
    losses=st.lists(st.floats(-0.2, 1.0), min_size=60, max_size=60),
    trials=st.integers(1, 12),
)
@settings(deadline=None, max_examples=200)
def test_whatever_is_measured_no_removal_is_tried_twice_and_none_beyond_the_limit_is_chosen(
    most: int, losses: list[float], trials: int
) -> None:
    search = Search(0.1, most, lambda steps: steps * steps / (most + 1 - steps), 1.0)
    points = searched(search, lambda steps: losses[steps - 1], trials)
    assert search.success(points).loss <= 0.1


def test_a_curve_that_is_right_needs_one_trial_and_one_that_is_wrong_by_a_factor_three_at_most() -> None:
    def curve(steps: int) -> float:
        return (steps / 1000) ** 2 / (1 - steps / 1001)

    for factor, allowed in ((1.0, 1), (0.3, 3), (4.0, 3)):
        points = searched(Search(0.1, 800, curve, factor), curve, 20)
        assert len(points) <= allowed
        assert ENOUGH * 0.1 <= points[-1].loss <= 0.1


def test_what_failed_below_a_success_is_passed_over() -> None:
    search = Search(0.1, 100, lambda steps: float(steps), 0.001)
    points = [Measured(10, 0.2), Measured(40, 0.05), Measured(60, 0.3)]
    assert search.success(points) == points[1]
    assert search.failure(points) == points[2]
    assert 40 < (search.next(points) or 0) < 60


def test_expectations_pass_through_what_was_measured() -> None:
    search = Search(0.1, 100, lambda steps: steps**1.5, 0.001)
    points = [Measured(20, 0.03), Measured(50, 0.4)]
    assert search.expected(points, 20) == pytest.approx(0.03)
    assert search.expected(points, 50) == pytest.approx(0.4)
    assert search.expected(points[:1], 80) == pytest.approx(0.03 * 4**1.5)
    assert search.expected([], 80) == pytest.approx(0.001 * 80**1.5)


def test_a_removal_that_costs_nothing_doubles() -> None:
    search = Search(math.log(1.1), 100, lambda steps: float(steps), 0.01)
    assert search.next([Measured(9, -0.02)]) == 18
    assert search.next([Measured(9, -0.02), Measured(100, 0.0)]) is None
