"""The corrective solve: least squares in the limit, the original in the other, a minimum in between."""

import torch

from compression.core.refit import RunningCross, refit
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


def test_running_sums_do_not_depend_on_chunks() -> None:
    a, t = randn(30, 5, seed=4).float(), randn(30, 3, seed=5).float()
    running = RunningCross(5, 3)
    for part in torch.arange(30).split([4, 1, 25]):
        running.add(a[part][None], t[part][None])
    torch.testing.assert_close(running.gram(), a.double().T @ a.double() / 30, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running.cross(), a.double().T @ t.double() / 30, rtol=1e-5, atol=1e-6)
    assert torch.equal(running.gram(), running.gram().T)
