"""nf4 against one scale for a whole weight, and against a uniform grid on weights that are normal."""

import pytest
import torch

from api_schemas.methods import Nf4Config
from compression.core.linear_walk import relative_error
from compression.core.normal_float import TABLE
from compression.methods.nf4 import Nf4
from compression.methods.round_to_nearest import round_to_nearest
from tests.compression.methods.test_gptq import correlated
from tests.compression.methods.test_round_to_nearest import per_tensor


def lost(W: torch.Tensor, C: torch.Tensor, **settings: object) -> float:
    solved = Nf4(Nf4Config.model_validate({"method": "nf4", **settings})).solve(W, C, torch.float32)
    return relative_error(W, solved.quantized.dequantized().double(), C)


def test_beats_one_scale_for_the_whole_weight_on_correlated_inputs() -> None:
    W, C = correlated(2)
    W = W * torch.logspace(-1, 1, len(W), dtype=W.dtype)[:, None]
    assert lost(W, C) < 0.7 * relative_error(W, per_tensor(W, 4), C)


def test_its_table_fits_normal_weights_better_than_a_grid_of_equal_steps() -> None:
    W, C = correlated(4, inputs=256)
    near = round_to_nearest(W, 4, 64, torch.float32).dequantized().double()
    assert lost(W, C) < 0.97 * relative_error(W, near, C)


def test_longer_runs_and_double_quantisation_cost_what_they_save() -> None:
    W, C = correlated(5, inputs=256)
    plain, double, longer = lost(W, C), lost(W, C, double_quantization=True), lost(W, C, block_size=256)
    assert 0.95 * plain < double < 1.05 * plain
    assert plain < longer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_rounded_in_a_dtype_that_the_library_has(dtype: torch.dtype) -> None:
    W, C = correlated(6)
    solved = Nf4(Nf4Config(method="nf4")).solve(W, C, dtype).quantized
    assert solved.dequantized().dtype is (torch.float32 if dtype is torch.float64 else dtype)


@pytest.mark.parametrize("double", [False, True])
def test_error_correction_beats_rounding_each_weight_alone_on_correlated_inputs(double: bool) -> None:
    W, C = correlated(7)
    corrected = lost(W, C, error_correction=True, double_quantization=double)
    assert corrected < 0.7 * lost(W, C, double_quantization=double)


def test_corrected_columns_equal_a_literal_float64_reference() -> None:
    """Each step inverts what is left of the Hessian; a swap of scales or of columns would show."""
    W, C = correlated(8)
    settings = Nf4Config(method="nf4", error_correction=True, damping_fraction=0.02)
    got = Nf4(settings).solve(W, C, torch.float32).quantized.dequantized().double()
    table = torch.tensor(TABLE, dtype=torch.float64)
    absmax = W.float().reshape(len(W), -1, 64).abs().amax(dim=-1).double().repeat_interleave(64, dim=1)
    H = C + 0.02 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    left, rest, done = C.diagonal().argsort(descending=True, stable=True).tolist(), W.clone(), torch.empty_like(W)
    while left:
        q, later = left[0], left[1:]
        inverse = torch.linalg.inv(H[left][:, left])
        points = table[:, None] * absmax[:, q]
        done[:, q] = points.gather(0, (points - rest[:, q]).abs().argmin(dim=0)[None])[0]
        rest[:, later] -= ((rest[:, q] - done[:, q]) / inverse[0, 0])[:, None] * inverse[0, 1:]
        left = later
    torch.testing.assert_close(got, done, rtol=1e-5, atol=1e-6)


def test_independent_inputs_of_one_size_leave_nothing_to_make_up_for() -> None:
    W, _ = correlated(9)
    identity = 2.5 * torch.eye(W.shape[1], dtype=torch.float64)
    plain, corrected = (
        Nf4(Nf4Config(method="nf4", error_correction=on)).solve(W, identity, torch.float32).quantized.dequantized()
        for on in (False, True)
    )
    assert torch.equal(plain, corrected)
