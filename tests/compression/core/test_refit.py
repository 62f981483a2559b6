"""The corrective solve: least squares in the limit, the original in the other, a minimum in between."""

import pytest
import torch

from compression.core.parallel import Alone, Share
from compression.core.refit import FALLBACK_RIDGE, RIDGES, TOO_FEW_CHUNKS, Moments, RunningCross, refit
from tests.compression.methods.test_modegpt import correlated, randn


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    A = correlated(200, 7, 1)
    return A, randn(200, 4, seed=2), randn(4, 7, seed=3)


def test_without_ridge_it_is_lstsq() -> None:
    A, T, W = problem()
    got, _ = refit(A.T @ A / 200, A.T @ T / 200, W, 1e-12)
    torch.testing.assert_close(got, torch.linalg.lstsq(A, T).solution.T, rtol=1e-5, atol=1e-7)


def test_with_all_the_ridge_it_is_the_original() -> None:
    A, T, W = problem()
    torch.testing.assert_close(refit(A.T @ A / 200, A.T @ T / 200, W, 1e12)[0], W, rtol=1e-6, atol=1e-8)


def test_the_gradient_vanishes_at_the_solution() -> None:
    A, T, W = problem()
    ridge = 0.03
    C = A.T @ A / 200
    got = refit(C, A.T @ T / 200, W, ridge)[0].requires_grad_(True)
    loss = (A @ got.T - T).square().sum() / 200 + ridge * C.diagonal().mean() * (got - W).square().sum()
    loss.backward()
    assert float(got.grad.abs().max()) < 1e-9


def test_a_target_that_is_the_original_output_changes_nothing() -> None:
    A, _, W = problem()
    torch.testing.assert_close(refit(A.T @ A / 200, A.T @ (A @ W.T) / 200, W, 0.1)[0], W)


def moments(a: torch.Tensor, t: torch.Tensor, *sizes: int) -> Moments:
    running = RunningCross(a.shape[1], t.shape[1])
    for part in torch.arange(len(a)).split(list(sizes) or [len(a)]):
        running.add(a[part][None], t[part][None])
    return running.folds().whole


@pytest.mark.parametrize("sizes", [(30,), (4, 1, 25), (4, 3, 7, 1, 15), (1, 2, 3, 16, 1, 2, 2, 3)])
def test_moments_are_those_of_all_tokens_however_chunked(sizes: tuple[int, ...]) -> None:
    """From the fourth chunk on some are held out: the whole is of those that fit and those that judge, by weight."""
    a, t = randn(30, 5, seed=4).float(), randn(30, 3, seed=5).float()
    got = moments(a, t, *sizes)
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
    solved = moments(A.float(), T.float()).refit(W, torch.zeros(4, dtype=torch.float64), 1e-12)
    ones = torch.cat([A, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    reference = torch.linalg.lstsq(ones, T).solution.T
    torch.testing.assert_close(torch.cat([solved.weight, solved.bias[:, None]], dim=1), reference, rtol=1e-3, atol=1e-4)


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


def test_an_input_correction_says_of_one_stream_what_the_linear_says_of_the_other() -> None:
    X, W, b = randn(300, 6, seed=1), randn(4, 6, seed=2), randn(4, seed=3)
    Y = X @ randn(6, 6, seed=4) + 0.5  # the other stream: the same, mixed and shifted
    folds = RunningCross(6, 6)
    folds.add(Y.float(), X.float())
    solved = folds.folds().towards(W, b).refit(W, b, 1e-12)
    torch.testing.assert_close(Y @ solved.weight.T + solved.bias, X @ W.T + b, rtol=1e-3, atol=1e-3)


def test_equal_streams_correct_nothing_whatever_the_ridge() -> None:
    X, W = randn(300, 6, seed=1), randn(4, 6, seed=2)
    running = RunningCross(6, 6)
    running.add(X.float(), X.float())
    for ridge in (1e-3, 10.0):
        torch.testing.assert_close(
            running.folds().towards(W, None).refit(W, None, ridge).weight, W, rtol=1e-6, atol=1e-6
        )


def test_the_ridge_is_large_where_the_target_is_noise_and_small_where_it_is_signal() -> None:
    A, W, truth = randn(64, 20, seed=1), randn(5, 20, seed=2), randn(5, 20, seed=3)
    noise, signal = RunningCross(20, 5), RunningCross(20, 5)
    for part in torch.arange(64).split(8):
        noise.add(A[part].float(), (A[part] @ W.T + 5 * randn(8, 5, seed=int(part[0]) + 9)).float())
        signal.add(A[part].float(), (A[part] @ truth.T).float())
    assert noise.folds().refit(W, None, None).ridge >= 1.0
    assert signal.folds().refit(W, None, None).ridge == min(RIDGES)


def test_a_share_holds_out_the_chunks_that_one_process_would() -> None:
    A, T, _ = problem()
    running = RunningCross(7, 4, Share(Alone(), slice(75, None), first_chunk=3))  # its first chunk is the fourth
    for part in torch.arange(75, 200).split(25):
        running.add(A[part].float(), T[part].float())
    folds = running.folds()
    judged = torch.cat([torch.arange(75, 100), torch.arange(175, 200)])
    assert folds.held_out is not None
    torch.testing.assert_close(folds.held_out.gram, A[judged].T @ A[judged] / 50, rtol=1e-4, atol=1e-5)


def test_held_out_chunks_judge_and_the_final_solve_uses_all() -> None:
    A, T, W = problem()
    running = RunningCross(7, 4)
    for part in torch.arange(200).split(25):
        running.add(A[part].float(), T[part].float())
    folds = running.folds()
    judged = torch.cat([torch.arange(75, 100), torch.arange(175, 200)])
    assert folds.held_out is not None
    torch.testing.assert_close(folds.held_out.gram, A[judged].T @ A[judged] / 50, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folds.whole.gram, A.T @ A / 200, rtol=1e-4, atol=1e-5)
    solved = folds.refit(W, None, None)
    expected = folds.whole.refit(W, None, solved.ridge).weight
    torch.testing.assert_close(solved.weight, expected)
    misfits = [
        float((A[judged] @ folds.fit.refit(W, None, ridge).weight.T - T[judged]).square().sum()) for ridge in RIDGES
    ]
    place = RIDGES.index(solved.ridge)
    assert misfits[place] == min(misfits[max(0, place - 1) : place + 2])


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_wherever_the_search_starts_it_finds_the_ridge_that_judges_best(noise: float) -> None:
    A, W, truth = randn(400, 20, seed=1), randn(5, 20, seed=2), randn(5, 20, seed=3)
    running = RunningCross(20, 5)
    for part in torch.arange(400).split(8):
        running.add(A[part].float(), (A[part] @ truth.T + noise * randn(8, 5, seed=int(part[0]) + 9)).float())
    folds = running.folds()
    assert folds.held_out is not None
    misfits = {ridge: folds.held_out.misfit(folds.fit.refit(W, None, ridge).weight, None) for ridge in RIDGES}
    best = min(misfits, key=misfits.__getitem__)
    for ridge in RIDGES:
        like = folds.whole.refit(W, None, ridge)
        assert folds.refit(W, None, None, like=like).ridge == best


def test_too_few_chunks_to_hold_any_out_use_the_fixed_ridge_and_say_so() -> None:
    A, T, W = problem()
    running = RunningCross(7, 4)
    running.add(A.float(), T.float())
    solved = running.folds().refit(W, None, None)
    assert (solved.ridge, solved.fallback) == (FALLBACK_RIDGE, TOO_FEW_CHUNKS)
    assert running.folds().refit(W, None, 0.5).fallback is None  # asked for, not fallen back to


def test_a_solve_says_what_damping_it_needed() -> None:
    A, T, W = problem()
    A[:, 3] = A[:, 2]  # singular, and the ridge too small to help
    assert moments(A.float(), T.float()).refit(W, None, 1e-14).damping > 0
    assert moments(A.float(), T.float()).refit(W, None, 1e-2).damping == 0


def test_token_weights_multiply_square_errors_by_their_squares() -> None:
    _, T, _ = problem()
    A = randn(200, 7, seed=21) + 0.5
    w = randn(200, 1, seed=8).abs()
    running = RunningCross(7, 4)
    running.add(A.float(), T.float(), w.float())
    whole, mass = running.folds().whole, float(w.square().sum())
    torch.testing.assert_close(whole.gram, (A * w).T @ (A * w) / mass, rtol=1e-4, atol=1e-5)
    # affine: the intercept's column carries the weights too
    solved = whole.refit(torch.zeros(4, 7, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 1e-12)
    reference = torch.linalg.lstsq(torch.cat([A * w, w], dim=1), T * w).solution.T
    torch.testing.assert_close(torch.cat([solved.weight, solved.bias[:, None]], dim=1), reference, rtol=1e-2, atol=1e-3)
