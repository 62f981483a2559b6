"""int8 against the crudest of its kind: one scale for a whole weight."""

import torch

from api_schemas.methods import Int8Config
from compression.core.linear_walk import relative_error
from compression.methods.int8 import Int8
from tests.compression.methods.test_gptq import correlated
from tests.compression.methods.test_round_to_nearest import per_tensor


def test_beats_one_scale_for_the_whole_weight_on_correlated_inputs() -> None:
    W, C = correlated(2)
    W = W * torch.logspace(-1, 1, len(W), dtype=W.dtype)[:, None]  # rows of different sizes, as trained ones are
    solved = Int8(Int8Config(method="int8")).solve(W, C, torch.bfloat16)
    got = relative_error(W, solved.quantized.dequantized().double(), C)
    assert got < 0.7 * relative_error(W, per_tensor(W, 8), C)
    assert solved.quantized.bits == 8


def test_the_threshold_changes_no_weight() -> None:
    W, C = correlated(3)
    codes = [
        Int8(Int8Config(method="int8", outlier_threshold=at)).solve(W, C, torch.float32).quantized for at in (0.0, 6.0)
    ]
    assert torch.equal(codes[0].dequantized(), codes[1].dequantized())
