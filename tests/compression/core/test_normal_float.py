"""4-bit codes of a table: the library's own bytes, its weights, and the nearest value in exact arithmetic."""

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit

from compression.core.normal_float import TABLE, quantize_normal, read_facts
from compression.core.packed_forms import count_bytes, count_parameters, unpacked


def weight(dtype: torch.dtype = torch.bfloat16, rows: int = 8, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Runs of different sizes: a swap of rows or runs would show."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 1, rows * columns // 64).reshape(rows, -1).repeat_interleave(64, dim=1)
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 128])
def test_bytes_and_weights_are_those_of_the_library(dtype: torch.dtype, block_size: int) -> None:
    assert torch.equal(torch.tensor(TABLE), get_4bit_type("nf4", device="cpu"))
    ours = quantize_normal(weight(dtype), block_size, dtype, double=False)
    packed, state = quantize_4bit(weight(dtype), blocksize=block_size, quant_type="nf4")
    stored = ours.tensors("m")
    theirs = {"weight": packed, **{f"weight.{name}": one for name, one in state.as_dict(packed=True).items()}}
    assert stored.keys() == {f"m.{name}" for name in theirs}
    assert all(torch.equal(stored[f"m.{name}"], one) for name, one in theirs.items())
    assert torch.equal(ours.dequantized(), dequantize_4bit(packed, state))
    assert torch.equal(unpacked(stored)["m.weight"], ours.dequantized())


def test_double_quantisation_is_read_by_the_library_as_it_is_by_us() -> None:
    ours = quantize_normal(weight(), 64, torch.bfloat16, double=True)
    stored = {name.removeprefix("m."): one for name, one in ours.tensors("m").items()}
    packed = stored.pop("weight")
    state = QuantState.from_dict({name.removeprefix("weight."): one for name, one in stored.items()}, "cpu")
    assert torch.equal(dequantize_4bit(packed, state), ours.dequantized())
    assert torch.equal(unpacked(ours.tensors("m"))["m.weight"], ours.dequantized())
    facts = stored["weight.quant_state.bitsandbytes__nf4"]
    assert read_facts(facts)["nested_offset"] == ours.scales.offset
    other = quantize_normal(2.125 * weight(seed=3), 64, torch.bfloat16, double=True).tensors("m")
    assert len(other["m.weight.quant_state.bitsandbytes__nf4"]) == len(facts)  # sizes are known before numbers are


@pytest.mark.parametrize("double", [False, True])
def test_no_other_code_is_nearer(double: bool) -> None:
    exact = weight(torch.float64)
    ours = quantize_normal(exact, 64, torch.float32, double=double)
    scales = ours.scales.absmax.double().repeat_interleave(64, dim=1)
    candidates = torch.tensor(TABLE, dtype=torch.float64)[:, None, None] * scales
    best = (candidates - exact).abs().amin(dim=0)
    got = (ours.dequantized().double() - exact).abs()
    assert bool((got <= best + 1e-6 * scales.abs()).all())


def test_a_run_of_zeros_stays_zero_and_the_state_counts_as_its_weight() -> None:
    zeros = weight()
    zeros[2, 64:128] = 0
    ours = quantize_normal(zeros, 64, torch.bfloat16, double=False)
    assert bool((ours.dequantized()[2, 64:128] == 0).all())
    state = {**ours.tensors("mlp.up_proj"), "norm.weight": torch.ones(256, dtype=torch.bfloat16)}
    facts = len(state["mlp.up_proj.weight.quant_state.bitsandbytes__nf4"])
    assert count_parameters(state) == 8 * 256 + 256
    assert count_bytes(state) == 8 * 128 + 32 * 4 + 64 + facts + 512
