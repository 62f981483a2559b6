"""The baseline: no entry is ever farther from its weight than from another grid point."""

import torch

from api_schemas.methods import RoundToNearestConfig
from compression.core.grid import limits
from compression.methods.round_to_nearest import RoundToNearest, round_to_nearest


def per_tensor(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`[out, in]` rounded with one scale for the whole of it: the crudest baseline."""
    low, high = limits(bits)
    scale = weight.abs().max() / (high + 0.5)
    return (weight / scale).round().clamp(low, high) * scale


def test_no_other_code_is_nearer() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = round_to_nearest(weight, 4, 32, torch.bfloat16)
    scale = got.scale.double().repeat_interleave(32, dim=1)
    low, high = limits(4)
    points = torch.arange(low, high + 1, dtype=torch.float64)[:, None, None] * scale
    nearest = (points - weight).abs().amin(dim=0)
    # rounding to the storage dtype moves a point by at most 2^-8 of itself
    assert bool(((got.dequantized().double() - weight).abs() <= nearest + points.abs().amax(dim=0) * 2**-8).all())
    torch.testing.assert_close(((got.codes * scale) - weight).abs(), nearest)


def test_inputs_play_no_part() -> None:
    method = RoundToNearest(RoundToNearestConfig(method="round_to_nearest", bits=8, group_size=None))
    weight = torch.randn(4, 40, dtype=torch.float64)
    one, other = (method.solve(weight, C, torch.float32) for C in (torch.eye(40), torch.zeros(40, 40)))
    assert torch.equal(one.quantized.codes, other.quantized.codes)
    assert (one.damping, one.fallback) == (0.0, None)
