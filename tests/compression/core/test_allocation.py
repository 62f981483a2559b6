"""The capped entropy allocation: budget, bounds, order, optimality."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.core.allocation import allocate

influences = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=40)


@given(influences, st.floats(0.01, 0.79), st.floats(0.02, 10.0))
@settings(max_examples=200)
def test_mean_is_the_request_and_no_block_exceeds_the_cap(values: list[float], sparsity: float, heat: float) -> None:
    """Invariant 8."""
    got = allocate(values, sparsity, heat, 0.8)
    assert sum(got) / len(got) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= one <= 0.8 + 1e-12 for one in got)


@given(influences, st.floats(0.01, 0.79))
def test_more_influence_never_gets_more_sparsity(values: list[float], sparsity: float) -> None:
    got = allocate(values, sparsity, 0.5, 0.8)
    by_influence = [share for _, share in sorted(zip(values, got, strict=True), key=lambda pair: pair[0])]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(by_influence))


def test_uncapped_blocks_satisfy_the_optimality_condition() -> None:
    """KKT: s_l + ε log φ_l is the same for all blocks below the cap, and not larger for those at it."""
    values, heat = [0.05, 0.1, 0.2, 0.4, 0.6, 1.0], 0.3
    epsilon = heat * sum(values) / len(values)
    got = allocate(values, 0.4, heat, 0.6)
    assert sum(one == 0.6 for one in got) >= 2
    level = [s + epsilon * math.log(phi) for s, phi in zip(values, got, strict=True) if phi < 0.6]
    assert max(level) - min(level) < 1e-9
    capped = [s + epsilon * math.log(phi) for s, phi in zip(values, got, strict=True) if phi == 0.6]
    assert max(capped) <= level[0] + 1e-9


def test_equal_influence_is_uniform() -> None:
    assert allocate([0.3] * 5, 0.25, 0.1, 0.8) == pytest.approx((0.25,) * 5)


def test_temperature_is_relative_to_the_mean_influence() -> None:
    small, large = allocate([0.1, 0.2, 0.3], 0.3, 0.5, 0.9), allocate([1.0, 2.0, 3.0], 0.3, 0.5, 0.9)
    assert small == pytest.approx(large)
