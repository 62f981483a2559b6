"""The corrective solve: least squares in the limit, the original in the other, a minimum in between."""

import pytest
import torch

from compression.core.refit import Moments, RunningCross, refit
from tests.compression.methods.test_modegpt import correlated, randn


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    A = correlated(200, 7, 1)
    return A, randn(200, 4, seed=2), randn(4, 7, seed=3)


def test_without_ridge_it_is_lstsq() -> None:
    A, T, W = problem()
    got = refit(A.T @ A / 200, A.T @ T / 200, W, 1e-12)
    torch.testing.assert_close(got, torch.linalg.lstsq(A, T).solution.T, rtol=1e-5, atol=1e-7)


def test_with_all_the_ridge_it_is_the_original() -> None:
    A, T, W = problem()
    torch.testing.assert_close(refit(A.T @ A / 200, A.T @ T / 200, W, 1e12), W, rtol=1e-6, atol=1e-8)


def test_the_gradient_vanishes_at_the_solution() -> None:
    A, T, W = problem()
    ridge = 0.03
    C = A.T @ A / 200
    got = refit(C, A.T @ T / 200, W, ridge).requires_grad_(True)
    loss = (A @ got.T - T).square().sum() / 200 + ridge * C.diagonal().mean() * (got - W).square().sum()
    loss.backward()
    assert float(got.grad.abs().max()) < 1e-9


def test_a_target_that_is_the_original_output_changes_nothing() -> None:
    A, _, W = problem()
    torch.testing.assert_close(refit(A.T @ A / 200, A.T @ (A @ W.T) / 200, W, 0.1), W)


def moments(a: torch.Tensor, t: torch.Tensor, *sizes: int) -> Moments:
    running = RunningCross(a.shape[1], t.shape[1])
    for part in torch.arange(len(a)).split(list(sizes) or [len(a)]):
        running.add(a[part][None], t[part][None])
    return running.moments()


def test_moments_are_those_of_all_tokens_however_chunked() -> None:
    a, t = randn(30, 5, seed=4).float(), randn(30, 3, seed=5).float()
    got = moments(a, t, 4, 1, 25)
    wide, target = a.double(), t.double()
    torch.testing.assert_close(got.gram, wide.T @ wide / 30, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.cross, wide.T @ target / 30, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.input_mean, wide.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.target_mean, target.mean(0), rtol=1e-6, atol=1e-7)
    assert got.target_energy == pytest.approx(float(target.square().sum() / 30))
    assert torch.equal(got.gram, got.gram.T)


def test_affine_refit_is_lstsq_with_a_column_of_ones() -> None:
    _, T, W = problem()
    A = randn(200, 7, seed=12) + 1.0  # means that matter
    weight, bias = moments(A.float(), T.float()).refit(W, torch.zeros(4, dtype=torch.float64), 1e-12)
    ones = torch.cat([A, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    reference = torch.linalg.lstsq(ones, T).solution.T
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), reference, rtol=1e-3, atol=1e-4)


def test_reported_error_is_the_one_on_the_tokens_with_and_without_bias() -> None:
    A, T, W = problem()
    got = moments(A.float(), T.float())
    b = randn(4, seed=11)
    for bias in (None, b):
        out = A @ W.T + (0 if bias is None else bias)
        expected = float((out - T).norm() / T.norm())
        assert got.relative_error(W, bias) == pytest.approx(expected, rel=1e-5)


def test_mapped_and_selected_inputs() -> None:
    A, T, _ = problem()
    whole = moments(A.float(), T.float())
    basis = randn(7, 3, seed=6)
    torch.testing.assert_close(whole.mapped(basis).gram, (A @ basis).T @ (A @ basis) / 200, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.mapped(basis).cross, (A @ basis).T @ T / 200, rtol=1e-4, atol=1e-5)
    kept = torch.tensor([1, 4])
    selection = torch.eye(7, dtype=torch.float64)[:, kept]
    for name in ("gram", "cross", "input_mean"):
        torch.testing.assert_close(getattr(whole.selected(kept), name), getattr(whole.mapped(selection), name))
