"""GPTQ: parity with a literal float64 reference, invariance to lazy batches, dead columns, better than rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from api_schemas.errors import JobFailed
from api_schemas.methods import GptqConfig
from compression.core.grid import dequantize, grid_scale, limits
from compression.core.linear_walk import relative_error
from compression.methods.gptq import gptq
from compression.methods.round_to_nearest import round_to_nearest

OUTPUTS, INPUTS = 24, 128


def config(**settings: Any) -> GptqConfig:
    return GptqConfig.model_validate({"method": "gptq", "group_size": 32, **settings})


def correlated(seed: int = 0, inputs: int = INPUTS, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """A weight and the correlation of inputs that lean on a few directions and differ in size, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(inputs // 8, inputs, generator=generator, dtype=torch.float64)
    sizes = torch.rand(inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    x = torch.randn(tokens, inputs // 8, generator=generator, dtype=torch.float64) @ basis
    x = (x + 0.3 * torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)) * sizes
    return torch.randn(OUTPUTS, inputs, generator=generator, dtype=torch.float64), x.T @ x / tokens


def literal(W: Tensor, C: Tensor, settings: GptqConfig) -> Tensor:
    """Optimal brain quantisation in a fixed order, by its definition: each step inverts what is left of the Hessian.

    Weights `[out, in]` of the result; no Cholesky factor, no batches (arXiv 2210.17323, equations 2 and 3).
    """
    low, high = limits(settings.bits)
    scale = grid_scale(W, settings.bits, settings.group_size, torch.float64)
    width = W.shape[1] // scale.shape[1]
    H = C + settings.damping_fraction * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    order = C.diagonal().argsort(descending=True, stable=True) if settings.activation_order else torch.arange(len(C))
    W, done = W.clone(), torch.empty_like(W)
    left = order.tolist()
    while left:
        q, later = left[0], left[1:]
        inverse = torch.linalg.inv(H[left][:, left])
        s = scale[:, q // width]
        done[:, q] = (W[:, q] / s).round().clamp(low, high) * s
        error = (W[:, q] - done[:, q]) / inverse[0, 0]
        W[:, later] -= error[:, None] * inverse[0, 1:]
        left = later
    return done


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, None), (8, 32)])
def test_equals_the_literal_reference(activation_order: bool, bits: int, group_size: int | None) -> None:
    W, C = correlated()
    settings = config(bits=bits, group_size=group_size, activation_order=activation_order)
    got = gptq(W, C, settings, torch.float64).quantized.dequantized()
    torch.testing.assert_close(got, literal(W, C, settings), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_does_not_depend_on_the_columns_per_lazy_update(activation_order: bool, group_size: int | None) -> None:
    W, C = correlated(1)
    settings = config(group_size=group_size, activation_order=activation_order)
    codes = [
        gptq(W, C, settings, torch.float32, column_block_size=size).quantized.codes for size in (1, 16, 24, 128, 999)
    ]
    assert all(torch.equal(one, codes[0]) for one in codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_beats_rounding_to_nearest_on_correlated_inputs(bits: int) -> None:
    W, C = correlated(2)
    near = round_to_nearest(W, bits, 32, torch.bfloat16).dequantized().double()
    got = gptq(W, C, config(bits=bits), torch.bfloat16).quantized.dequantized().double()
    assert relative_error(W, got, C) < 0.7 * relative_error(W, near, C)


def test_independent_inputs_of_one_size_leave_nothing_to_make_up_for() -> None:
    """With a Hessian that is a multiple of the identity, GPTQ is rounding to nearest."""
    W, _ = correlated(3)
    got = gptq(W, 2.5 * torch.eye(INPUTS, dtype=torch.float64), config(), torch.float32).quantized
    want = round_to_nearest(W, 4, 32, torch.float32)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("activation_order", [True, False])
def test_dead_columns_are_rounded_and_change_nothing_else(activation_order: bool) -> None:
    """T10."""
    W, C = correlated(4)
    dead = [3, 64, 127]
    C[dead] = 0
    C[:, dead] = 0
    settings = config(activation_order=activation_order)
    solved = gptq(W, C, settings, torch.float64)
    near = round_to_nearest(W, 4, 32, torch.float64)
    assert torch.equal(solved.quantized.codes[:, dead], near.codes[:, dead])
    assert solved.fallback is not None
    assert "zero on every calibration token" in solved.fallback
    louder = W.clone()
    louder[:, dead] *= -1  # same scales, other dead weights
    alive = [column for column in range(INPUTS) if column not in dead]
    again = gptq(louder, C, settings, torch.float64)
    assert torch.equal(again.quantized.codes[:, alive], solved.quantized.codes[:, alive])


def test_without_a_single_token_it_is_rounding_to_nearest_and_says_so() -> None:
    """T21."""
    W, C = correlated(5)
    solved = gptq(W, torch.zeros_like(C), config(), torch.float32)
    assert torch.equal(solved.quantized.codes, round_to_nearest(W, 4, 32, torch.float32).codes)
    assert solved.fallback is not None
    assert "no calibration token" in solved.fallback


def test_fewer_tokens_than_inputs_are_damped_and_the_damping_is_reported() -> None:
    """T10: a correlation of rank 9 in 128 dimensions."""
    W, C = correlated(6, tokens=9)
    solved = gptq(W, C, config(damping_fraction=0.02), torch.float32)
    assert solved.damping == pytest.approx(0.02)
    assert bool(torch.isfinite(solved.quantized.dequantized()).all())


def test_infinite_activations_are_a_named_failure() -> None:
    """T10."""
    W, C = correlated(7)
    C[5, 5] = torch.inf
    with pytest.raises(JobFailed) as caught:
        gptq(W, C, config(), torch.float32)
    assert caught.value.code == "not_finite"


def test_an_order_by_size_rounds_the_largest_input_as_it_is() -> None:
    """The first column in order is rounded before anything is made up for: its code is the nearest."""
    W, C = correlated(8)
    loudest = int(C.diagonal().argmax())
    solved = gptq(W, C, config(), torch.float64).quantized
    near = round_to_nearest(W, 4, 32, torch.float64)
    assert torch.equal(solved.codes[:, loudest], near.codes[:, loudest])
    assert not torch.equal(solved.codes, near.codes)
    assert torch.equal(dequantize(solved.codes, solved.scale), solved.dequantized())
