"""The three decompositions against slow references in float64: closed forms, optimality, index-sensitive shapes."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.methods import modegpt_decompositions
from compression.methods.modegpt_decompositions import channels_of, keep_pairs, leverage_scores, nystrom, value_output


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Activations whose channels differ in scale and depend on each other."""
    mix = randn(width, width, seed=seed) * torch.logspace(0, -1.5, width, dtype=torch.float64)
    return randn(tokens, width, seed=seed + 1) @ mix


def test_doctests() -> None:
    assert doctest.testmod(modegpt_decompositions).failed == 0


@given(width=st.integers(2, 24), seed=st.integers(0, 10**6), ridge=st.floats(1e-4, 1.0))
@settings(deadline=None, max_examples=40)
def test_leverage_scores_are_the_definition(width: int, seed: int, ridge: float) -> None:
    """Invariant 2: the Cholesky form equals diag(C (C+λI)⁻¹), and their sum is the effective dimension."""
    A = correlated(3 * width, width, seed)
    C = A.T @ A / len(A)
    scale = ridge * C.diagonal().mean()
    reference = (C @ torch.linalg.inv(C + scale * torch.eye(width, dtype=torch.float64))).diagonal()
    scores = leverage_scores(C, ridge)
    torch.testing.assert_close(scores, reference, rtol=1e-8, atol=1e-10)
    eigenvalues = torch.linalg.eigvalsh(C)
    torch.testing.assert_close(scores.sum(), (eigenvalues / (eigenvalues + scale)).sum(), rtol=1e-8, atol=1e-10)


@given(hidden=st.integers(1, 9), width=st.integers(3, 20), seed=st.integers(0, 10**6), data=st.data())
@settings(deadline=None, max_examples=40)
def test_nystrom_is_least_squares_on_the_kept_units(hidden: int, width: int, seed: int, data: st.DataObject) -> None:
    """Invariant 3: the re-fit equals lstsq, and the reported residual is the one measured on the tokens."""
    kept = data.draw(st.integers(1, width))
    A, D = correlated(6 * width, width, seed), randn(hidden, width, seed=seed + 2)
    C = A.T @ A / len(A)
    solved = nystrom(C, D, kept, 1e-2)
    assert solved.kept.tolist() == sorted(set(solved.kept.tolist()))
    reference = torch.linalg.lstsq(A[:, solved.kept], A @ D.T).solution.T
    torch.testing.assert_close(solved.down, reference, rtol=1e-6, atol=1e-8)
    residual = (A @ D.T - A[:, solved.kept] @ solved.down.T).norm() / (A @ D.T).norm()
    assert solved.relative_error == pytest.approx(float(residual), abs=1e-6)
    J, rest = solved.kept, C
    schur = rest - rest[:, J] @ torch.linalg.inv(C[J][:, J]) @ rest[J]
    by_schur = torch.trace(D @ schur @ D.T) / torch.trace(D @ C @ D.T)  # its rounding noise must not meet a root
    assert solved.relative_error**2 == pytest.approx(float(by_schur), abs=1e-9)


def test_nystrom_keeps_everything_and_changes_nothing_at_full_width() -> None:
    A, D = correlated(100, 12, 3), randn(5, 12, seed=9)
    solved = nystrom(A.T @ A / 100, D, 12, 1e-2)
    torch.testing.assert_close(solved.down, D, rtol=1e-8, atol=1e-9)
    assert solved.relative_error < 1e-6


def test_nystrom_refit_beats_dropping_columns_and_error_falls_with_width() -> None:
    """Invariant 10."""
    A, D = correlated(400, 30, 5), randn(7, 30, seed=6)
    C = A.T @ A / 400
    errors = []
    for width in range(5, 31, 5):
        solved = nystrom(C, D, width, 1e-2)
        dropped = (A @ D.T - A[:, solved.kept] @ D[:, solved.kept].T).norm() / (A @ D.T).norm()
        assert solved.relative_error <= float(dropped) + 1e-9
        errors.append(solved.relative_error)
    assert errors == sorted(errors, reverse=True)


def test_nystrom_survives_dead_units_and_fewer_tokens_than_units() -> None:
    """T10: a rank-deficient correlation is damped, the damping is reported, the weights are finite."""
    A, D = correlated(6, 20, 7), randn(4, 20, seed=8)
    A[:, 3] = 0
    solved = nystrom(A.T @ A / 6, D, 15, 1e-2)
    assert bool(torch.isfinite(solved.down).all())
    assert solved.damping > 0
    assert 3 not in solved.kept.tolist()


def test_channels_pair_each_index_with_its_other_half() -> None:
    assert channels_of(torch.tensor([[0, 2], [1, 3]]), 8).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_keep_pairs_takes_the_best_of_each_head_in_ascending_order() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 1.0, 3.0, 2.0]])
    assert keep_pairs(scores, 4).tolist() == [[1, 3], [0, 2]]


@given(
    group=st.integers(1, 4),
    hidden=st.integers(2, 9),
    head=st.integers(2, 7),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_value_output_loses_the_discarded_singular_energy(
    group: int, hidden: int, head: int, seed: int, data: st.DataObject
) -> None:
    """Invariant 4: the group's error is the discarded singular energy of R [O_1ᵀ | …]; no rank-k map is better."""
    rank = data.draw(st.integers(1, head))
    v = correlated(50, head, seed)
    O = randn(group, hidden, head, seed=seed + 1)  # noqa: E741
    solved = value_output(v.T @ v / 50, O, rank)
    error = sum(float(((v @ O[i].T - v @ solved.basis @ solved.output[i].T) ** 2).sum()) / 50 for i in range(group))
    stacked = torch.cat([v @ O[i].T for i in range(group)], dim=1) / 50**0.5
    singular = torch.linalg.svdvals(stacked)
    best = float((singular[rank:] ** 2).sum())
    scale = float((singular**2).sum())
    assert error == pytest.approx(best, abs=1e-7 * scale)
    assert solved.lost == pytest.approx(best, abs=1e-7 * scale)
    assert solved.whole == pytest.approx(scale, rel=1e-7)


def test_value_output_equals_the_papers_two_svds() -> None:
    """Invariant 5: Algorithm 3 with d x d roots gives the same product W_V' W_O' for one head without bias."""
    hidden, head, rank, tokens = 10, 4, 2, 200
    X, V, W_O = correlated(tokens, hidden, 1), randn(hidden, head, seed=2), randn(head, hidden, seed=3)
    C = X.T @ X / tokens
    energy, basis = torch.linalg.eigh(C)
    root = basis @ torch.diag(energy.clamp_min(0).sqrt()) @ basis.T
    U, S, Vt = torch.linalg.svd(root @ V, full_matrices=False)
    U2, S2, Vt2 = torch.linalg.svd(torch.diag(S) @ Vt @ W_O, full_matrices=False)
    paper = torch.linalg.inv(root) @ U @ U2[:, :rank] @ torch.diag(S2[:rank]) @ Vt2[:rank]
    v = X @ V
    ours = value_output(v.T @ v / tokens, W_O.T[None], rank)
    torch.testing.assert_close(V @ ours.basis @ ours.output[0].T, paper, rtol=1e-6, atol=1e-8)
