"""nf4 against one scale for a whole weight, and against a uniform grid on weights that are normal."""

import pytest
import torch

from api_schemas.methods import Nf4Config
from compression.core.linear_walk import relative_error
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
