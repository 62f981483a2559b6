"""Codes, scales and words: exact both ways, and the same as the package that every reader of them uses."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from compression.core.grid import (
    Quantized,
    dequantize,
    grid_scale,
    nearest_codes,
    pack,
    unpack,
)
from compression.core.packed_forms import count_bytes, count_parameters, unpacked


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_packing_is_undone_by_unpacking_and_by_the_foreign_reader(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = pack(codes, bits)
    assert torch.equal(unpack(words, bits, columns), codes)
    assert torch.equal(words, pack_to_int32(codes, bits)) or columns % (32 // bits)  # padding is nobody's business
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 32])
def test_every_weight_is_within_half_a_step_of_its_grid(dtype: torch.dtype, group_size: int | None) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = grid_scale(weight, 4, group_size, dtype)
    assert scale.dtype == dtype
    grouped = weight.reshape(*scale.shape, -1)
    codes = nearest_codes(grouped, scale[..., None], 4).reshape(weight.shape)
    near = dequantize(codes, scale).double().reshape(grouped.shape)
    half = scale.double()[..., None] / 2
    rounding = 1 + 16 * torch.finfo(dtype).eps  # of the scale and of 8 steps, in units of half a step
    assert bool(((near - grouped).abs() <= half * rounding).all())
    assert codes.min() == -8 or codes.max() == 7


def test_a_group_of_zeros_stays_zero() -> None:
    scale = grid_scale(torch.zeros(2, 32, dtype=torch.float64), 8, 32, torch.bfloat16)
    assert torch.equal(scale, torch.ones(2, 1, dtype=torch.bfloat16))


def test_scales_belong_to_their_rows_and_groups() -> None:
    """A swap of rows and groups, or of neighbours, would show: every group has another size."""
    sizes = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64)
    weight = sizes.repeat_interleave(32, dim=1)
    scale = grid_scale(weight, 8, 32, torch.float64)
    torch.testing.assert_close(scale * 127.5, sizes)
    codes = nearest_codes(weight.reshape(2, 3, 32), scale[..., None], 8).reshape(2, 96)
    torch.testing.assert_close(dequantize(codes, scale), weight, rtol=0.005, atol=0)


def test_packed_tensors_stand_for_the_weight_and_count_as_it() -> None:
    codes = torch.randint(-8, 8, (3, 40), dtype=torch.int8)
    quantized = Quantized(codes, torch.rand(3, 1, dtype=torch.bfloat16), 4)
    state = {**quantized.tensors("mlp.up_proj"), "norm.weight": torch.ones(40, dtype=torch.bfloat16)}
    plain = unpacked(state)
    assert plain.keys() == {"mlp.up_proj.weight", "norm.weight"}
    assert torch.equal(plain["mlp.up_proj.weight"], quantized.dequantized())
    assert count_parameters(state) == count_parameters(plain) == 3 * 40 + 40
    assert count_bytes(state) == 3 * 5 * 4 + 3 * 2 + 16 + 40 * 2
