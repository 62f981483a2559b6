"""Removal orders and budgets against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.core.budget import PriceList, cheapest_curve, spend
from compression.core.selection import removal_order, symmetric_factor
from compression.methods.modegpt_decompositions import nystrom
from tests.compression.methods.test_modegpt import correlated, randn


def refit_loss(C: torch.Tensor, D: torch.Tensor, F: torch.Tensor, kept: torch.Tensor) -> float:
    """tr(F E) of the exact re-fit's residual E = D (C − C_:J C_JJ⁻¹ C_J:) Dᵀ."""
    schur = C - C[:, kept] @ torch.linalg.inv(C[kept][:, kept]) @ C[kept]
    return float((F * (D @ schur @ D.T)).sum())


@given(width=st.integers(4, 26), hidden=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_prices_are_the_loss_of_the_exact_refit_in_the_metric(width: int, hidden: int, seed: int) -> None:
    A, D, R = (
        correlated(8 * width, width, seed),
        randn(hidden, width, seed=seed + 1),
        randn(hidden, hidden, seed=seed + 2),
    )
    C, F = A.T @ A / len(A), R @ R.T
    removal = removal_order(C, D, F)
    assert sorted(removal.order.tolist()) == list(range(width))
    scale = float((F * (D @ C @ D.T)).sum())
    for left, price in zip(removal.widths, removal.losses, strict=True):
        assert price == pytest.approx(refit_loss(C, D, F, removal.keep(left)), abs=2e-4 * scale)
    assert list(removal.losses) == sorted(removal.losses)


def test_the_first_to_go_is_the_best_single_removal() -> None:
    A, D = correlated(200, 9, 4), randn(3, 9, seed=5)
    C, F = A.T @ A / 200, torch.eye(3, dtype=torch.float64)
    losses = [refit_loss(C, D, F, torch.tensor([j for j in range(9) if j != i])) for i in range(9)]
    assert int(removal_order(C, D, None).order[0]) == min(range(9), key=losses.__getitem__)


def test_output_aware_choice_beats_leverage_scores_where_outputs_matter() -> None:
    loud = torch.logspace(-1, 1, 40, dtype=torch.float64)  # the loudest units are those that nobody listens to
    A, D = randn(600, 40, seed=6) * loud, randn(4, 40, seed=7) / loud**2
    C, identity = A.T @ A / 600, torch.eye(4, dtype=torch.float64)
    ours = refit_loss(C, D, identity, removal_order(C, D, None).keep(20))
    leverage = refit_loss(C, D, identity, nystrom(C, D, 20, 1e-2).kept)
    assert ours < leverage


def test_a_dead_unit_goes_first_and_batches_are_multiples() -> None:
    A, D = correlated(400, 96, 8), randn(5, 96, seed=9)
    A[:, 17] = 0
    removal = removal_order(A.T @ A / 400, D, None, multiple=8)
    assert 17 in removal.order[:8].tolist()
    assert all(width % 8 == 0 for width in removal.widths)


@pytest.mark.parametrize("width", [95, 64, 40, 10, 1])
def test_an_order_that_ends_early_keeps_the_same_units(width: int) -> None:
    A, D = correlated(400, 96, 8), randn(5, 96, seed=9)
    whole, short = (removal_order(A.T @ A / 400, D, None, multiple=4, until=until) for until in (0, width))
    assert whole.keep(width).tolist() == short.keep(width).tolist()
    assert short.losses == whole.losses[: len(short.losses)]


def test_symmetric_factor_squares_to_its_metric() -> None:
    R = randn(5, 3, seed=1)
    factor = symmetric_factor(R @ R.T)
    torch.testing.assert_close(factor @ factor.T, R @ R.T)


prices = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=4).map(lambda steps: (0.0, *itertools.accumulate(steps)))


@given(st.lists(prices, min_size=1, max_size=5), st.floats(0.0, 1.0), st.data())
@settings(deadline=None, max_examples=100)
def test_budgets_are_met_and_no_cheaper_choice_on_the_hull_exists(
    curves: list[tuple[float, ...]], share: float, data: st.DataObject
) -> None:
    lists = []
    for curve in curves:
        unit = data.draw(st.integers(1, 5))
        widths = tuple(range(len(curve), 0, -1))
        lists.append(PriceList(widths, tuple(unit * at for at in range(len(curve))), tuple(sorted(curve))))
    wanted = int(share * sum(one.saved[-1] for one in lists))
    got = spend(lists, wanted)
    at = [one.widths.index(width) for one, width in zip(lists, got, strict=True)]
    saved = sum(one.saved[index] for one, index in zip(lists, at, strict=True))
    price = sum(one.prices[index] for one, index in zip(lists, at, strict=True))
    assert saved >= wanted
    # Lagrangian duality: saving `saved` parameters cannot be had cheaper than the hull's price, give or take one step
    best = min(
        sum(one.prices[i] for one, i in zip(lists, choice, strict=True))
        for choice in itertools.product(*(range(len(one.widths)) for one in lists))
        if sum(one.saved[i] for one, i in zip(lists, choice, strict=True)) >= wanted
    )
    dearest = max(max(b - a for a, b in itertools.pairwise(one.prices)) for one in lists)
    assert price <= best + len(lists) * dearest + 1e-9


@given(curves=st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=6).map(tuple), min_size=1, max_size=3))
@settings(deadline=None, max_examples=100)
def test_the_cheapest_curve_is_the_lower_hull_of_all_choices(curves: list[tuple[float, ...]]) -> None:
    lists = [
        PriceList(tuple(range(len(curve), 0, -1)), tuple(3 * at for at in range(len(curve))), (0.0, *sorted(curve)[1:]))
        for curve in curves
    ]
    choices = [
        (sum(one.saved[at] for one, at in zip(lists, picks, strict=True)),
         sum(one.prices[at] for one, at in zip(lists, picks, strict=True)))
        for picks in itertools.product(*(range(len(one.widths)) for one in lists))
    ]  # fmt: skip
    curve = cheapest_curve(lists)
    assert curve[0] == (0, 0.0)
    assert curve[-1][0] == sum(one.saved[-1] for one in lists)
    for saved, price in curve:  # each point is a choice …
        assert min(cost for got, cost in choices if got == saved) == pytest.approx(price, abs=1e-9)
    for (s0, p0), (s1, p1) in itertools.pairwise(curve):  # … and no choice lies below the lines between them
        for got, cost in choices:
            if s0 <= got <= s1:
                assert cost >= p0 + (p1 - p0) * (got - s0) / (s1 - s0) - 1e-9


def test_a_budget_nobody_can_meet_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 4"):
        spend([PriceList((3, 2, 1), (0, 2, 4), (0.0, 1.0, 2.0))], 5)


def test_the_cheap_part_pays() -> None:
    cheap = PriceList((4, 3, 2, 1), (0, 10, 20, 30), (0.0, 0.1, 0.2, 0.3))
    dear = PriceList((4, 3, 2, 1), (0, 10, 20, 30), (0.0, 5.0, 10.0, 15.0))
    assert spend([cheap, dear], 30) == (1, 4)
