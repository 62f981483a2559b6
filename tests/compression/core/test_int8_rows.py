"""8-bit codes by rows and rounded inputs: the library's own codes, and what its kernel computes."""

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear8bitLt

from compression.core.int8_rows import quantize_rows, rounded_inputs
from compression.core.packed_forms import count_bytes, count_parameters, unpacked


def weight(rows: int = 24, columns: int = 40, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes in bfloat16: a swap of rows would show."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 1, rows)[:, None]
    return (torch.randn(rows, columns, generator=generator) * sizes).to(torch.bfloat16)


def test_codes_and_weights_are_those_of_the_library() -> None:
    ours = quantize_rows(weight())
    codes, absmax, _ = int8_vectorwise_quant(weight().to(torch.float16))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.dequantized(), int8_vectorwise_dequant(codes, absmax))


def test_every_weight_is_within_half_a_step_in_exact_arithmetic() -> None:
    ours, exact = quantize_rows(weight().double()), weight().double()
    half = exact.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert bool(((ours.dequantized().double() - exact).abs() <= half * (1 + 1e-5)).all())


def test_zeros_small_and_large_rows_survive_where_float16_would_not() -> None:
    odd = torch.tensor([[0.0, 0.0], [1e-12, -5e-13], [1e30, 2.5e29], [1e-44, 0.0]])
    ours = quantize_rows(odd)
    assert ours.codes[0].tolist() == [0, 0]
    assert ours.codes[1:3].tolist() == [[127, -64], [127, 32]]
    assert bool(torch.isfinite(ours.dequantized()).all())


def test_a_state_counts_as_the_weight_that_it_stands_for() -> None:
    state = {**quantize_rows(weight()).tensors("mlp.up_proj"), "norm.weight": torch.ones(40, dtype=torch.bfloat16)}
    plain = unpacked(state)
    assert plain.keys() == {"mlp.up_proj.weight", "norm.weight"}
    assert count_parameters(state) == count_parameters(plain) == 24 * 40 + 40
    assert count_bytes(state) == 24 * 40 + 24 * 4 + 1 + 40 * 2


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("tokens", [1, 7])
def test_rounded_inputs_give_what_the_kernel_gives(threshold: float, tokens: int) -> None:
    """Against the library's kernel in float32; a mutant that keeps outliers for their own token alone must fail."""
    inputs = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1))
    inputs[0, 3], inputs[-1, 11] = 9.0, -6.0
    linear = Linear8bitLt(40, 24, bias=False, has_fp16_weights=False, threshold=threshold).eval()
    linear.weight = Int8Params(weight().float(), requires_grad=False).to("cpu")
    codes = quantize_rows(weight())
    with torch.inference_mode():
        want = linear(inputs.clone())
    got = rounded_inputs(inputs, threshold) @ codes.dequantized().T
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    if threshold and tokens > 1:
        one_by_one = torch.cat([rounded_inputs(row[None], threshold) for row in inputs]) @ codes.dequantized().T
        assert not torch.allclose(one_by_one, want, rtol=1e-3, atol=1e-3)


def test_outliers_kept_apart_leave_smaller_errors_than_rounding_them() -> None:
    inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    inputs[:, 5] *= 60
    plain, apart = ((rounded_inputs(inputs, threshold) - inputs).norm() for threshold in (0.0, 6.0))
    assert apart < 0.2 * plain
