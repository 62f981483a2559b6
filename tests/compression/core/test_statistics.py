"""Running sums: equal to the whole at once, however the tokens are batched."""

import pytest
import torch

from api_schemas.errors import JobFailed
from compression.core import linalg
from compression.core.linalg import add_gram_, all_finite, energy, factorize, mirror_
from compression.core.statistics import RunningEnergy, RunningGram, RunningInfluence


def activations(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", [1, 3])
def test_gram_is_the_correlation_of_each_group_however_batched(groups: int) -> None:
    x = activations(40, 12)
    one, many = RunningGram(groups, 12 // groups), RunningGram(groups, 12 // groups)
    one.add(x)
    for part in x.split([1, 7, 12, 20]):
        many.add(part[None])
    wide = x.double().reshape(40, groups, -1)
    reference = torch.stack([wide[:, g].T @ wide[:, g] / 40 for g in range(groups)])
    torch.testing.assert_close(one.mean(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(many.mean(), reference, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.mean(), one.mean().mT)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_taken_mean_is_the_mean(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "COLUMNS", 5)
    gram = RunningGram(groups, 12 // groups)
    gram.add(activations(40, 12))
    mean = gram.mean()
    assert torch.equal(gram.take_mean(), mean)


def test_energy_is_the_diagonal_of_the_gram() -> None:
    x = activations(30, 8)
    energy, gram = RunningEnergy(2, 4), RunningGram(2, 4)
    energy.add(x)
    gram.add(x)
    torch.testing.assert_close(energy.energy(), gram.energy(), rtol=1e-5, atol=1e-7)


def test_influence_is_one_minus_the_mean_cosine() -> None:
    influence = RunningInfluence()
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    influence.add(x[:1], y[:1])
    influence.add(x[1:], y[1:])
    assert influence.value() == pytest.approx(1 - (1 + 0 - 1) / 3)


def test_factor_solves_inverts_and_names_its_damping() -> None:
    x = activations(50, 6).double()
    A = x.T @ x
    factor = factorize(A, "A")
    assert factor.damping == 0.0
    B = activations(6, 2).double()
    torch.testing.assert_close(A @ factor.solve(B), B, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factor.inverse_diagonal(), torch.linalg.inv(A).diagonal(), rtol=1e-9, atol=1e-12)
    singular = factorize(torch.ones(4, 4, dtype=torch.float64), "ones")
    assert singular.damping > 0
    assert factorize(torch.zeros(3, 3, dtype=torch.float64), "zeros").damping > 0


@pytest.mark.parametrize("columns", [1, 4, 5, 12, 100])
def test_slices_of_columns_give_the_same_as_all_at_once(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "COLUMNS", columns)
    x, D = activations(50, 12).double(), activations(7, 12).double()
    A = x.T @ x
    torch.testing.assert_close(factorize(A, "A").inverse_diagonal(), torch.linalg.inv(A).diagonal())
    torch.testing.assert_close(energy(D, A), torch.trace(D @ A @ D.T))
    askew = activations(12, 12)
    assert torch.equal(mirror_(askew.clone()), askew.triu() + askew.triu(1).T)


@pytest.mark.parametrize("panel", [1, 4, 5, 12, 100])
def test_panels_of_a_gram_add_up_to_the_whole_product(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "PANEL", panel)
    one, other = activations(50, 12), activations(30, 12)
    upper = torch.zeros(12, 12, dtype=torch.float64)
    add_gram_(upper, one)
    add_gram_(upper, other)
    whole = one.double().T @ one.double() + other.double().T @ other.double()
    torch.testing.assert_close(mirror_(upper), whole, rtol=1e-5, atol=1e-5)


def test_a_ridge_is_added_and_the_matrix_comes_back_as_it_was() -> None:
    x = activations(3, 6).double()
    A = x.T @ x
    before = A.clone()
    factor = factorize(A, "A", 0.5)
    torch.testing.assert_close(factor.lower @ factor.lower.T, A + 0.5 * torch.eye(6).double())
    damped = factorize(A, "A")
    torch.testing.assert_close(damped.lower @ damped.lower.T, A + damped.added * torch.eye(6).double())
    assert damped.damping > 0
    assert torch.equal(A, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_entry_that_is_not_finite_is_seen(dtype: torch.dtype) -> None:
    assert all_finite(activations(5, 4).to(dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    for value in ("nan", "inf", "-inf"):
        A = activations(5, 4).to(dtype)
        A[2, 1] = float(value)
        assert not all_finite(A)


def test_infinite_activations_are_named() -> None:
    A = torch.full((2, 2), float("inf"), dtype=torch.float64)
    with pytest.raises(JobFailed, match="MLP correlation") as caught:
        factorize(A, "MLP correlation")
    assert caught.value.code == "not_finite"
