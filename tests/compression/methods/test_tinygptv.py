"""tinygptv: errors as kernels make them, and the choice against every other choice."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

from api_schemas.methods import TinygptvConfig
from compression.core.linear_walk import relative_error
from compression.core.streamed_model import StreamedModel
from compression.methods.tinygptv import choose, output_errors, squared_errors
from preflight.checkpoint import open_checkpoint
from preflight.code_budget import KEPT, CodeBudget
from preflight.families import resolve
from preflight.memory_needs import Needs
from preflight.quantized_linears import BlockLinear
from preflight.safetensors_header import TensorEntry
from tests.compression.methods.test_gptq import correlated
from tests.compression.methods.test_round_to_nearest import per_tensor
from tests.compression.walks import random_tokens
from tests.tiny_models import make_tiny_model


def config(limit: int = 1) -> TinygptvConfig:
    return TinygptvConfig(method="tinygptv", fit_bytes=limit)


def budget(limit: int, *, mixes: bool, tower: bool = False, skipped: str | None = None) -> CodeBudget:
    """Four linears of different sizes, the last too narrow for 4 bits."""
    sizes = [(64, 64), (64, 128), (128, 64), (96, 40)]
    linears = tuple(
        BlockLinear(0, f"layers.0.{at}", f"layers.0.{at}", (str(at),), rows, columns, skipped if at == 0 else None)
        for at, (rows, columns) in enumerate(sizes)
    )
    seen = {"vision.layers.0.fc": TensorEntry("w", "BF16", (128, 128), Path("x"), 0, 2 * 128 * 128)} if tower else {}
    step = config(limit)
    return CodeBudget(step, linears, seen, mixes, itemsize=2, dtype="bfloat16", fixed=1000, needs=Needs(10, 20))


def errors(seed: int) -> dict[str, dict[int, float]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for at in range(4):
        eight = float(torch.rand((), generator=generator)) * 1e-4
        found[f"layers.0.{at}"] = {
            KEPT: 0.0,
            8: eight,
            4: 40 * eight + float(torch.rand((), generator=generator)) * 0.01,
        }
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.4, 0.55, 0.7, 0.9])
@pytest.mark.parametrize("mixes", [True, False])
def test_fits_and_no_choice_of_as_many_bytes_is_much_better(seed: int, share: float, mixes: bool) -> None:
    """Against all choices: greedy on convex hulls may miss the best by one linear's step, never the budget."""
    whole, lost = budget(1, mixes=mixes, tower=True), errors(seed)
    limit = round(share * whole.plain) + 30
    asked = replace(whole, step=config(limit))
    if asked.smallest > limit - 30:
        with pytest.raises(ValueError, match="fewest bits"):
            choose(asked, lost, 1e-5)
        return
    chosen = choose(asked, lost, 1e-5)
    assert asked.total(chosen.bits, chosen.tower) <= limit - 30
    assert mixes or len({*chosen.bits.values(), chosen.tower} - {KEPT}) <= 1

    def cost(bits: dict[str, int], tower: int) -> float:
        return sum(lost[path][one] for path, one in bits.items()) + (1e-5 if tower == 8 else 0.0)

    every = [
        (dict(zip(lost, combination, strict=True)), tower)
        for base in asked.bases
        for combination in itertools.product(*(asked.options(one, base) for one in asked.linears))
        for tower in asked.tower_options(base)
    ]
    fitting = [(bits, tower) for bits, tower in every if asked.total(bits, tower) <= limit - 30]
    best = min(cost(*one) for one in fitting)
    largest = max(lost[path][4] for path in lost)
    assert cost(dict(chosen.bits), chosen.tower) <= best + largest
    alone = (
        min(cost(*one) for one in fitting if len(set(one[0].values())) == 1)
        if any(len(set(one[0].values())) == 1 for one in fitting)
        else torch.inf
    )
    assert cost(dict(chosen.bits), chosen.tower) <= alone + 1e-12  # never worse than all linears alike


def test_more_bytes_never_lose_more() -> None:
    lost = errors(3)
    found = []
    for share in (0.45, 0.6, 0.75, 0.9, 0.99):
        whole = budget(1, mixes=True)
        chosen = choose(replace(whole, step=config(round(share * whole.plain) + 30)), lost, 0.0)
        found.append(sum(lost[path][bits] for path, bits in chosen.bits.items()))
    assert found == sorted(found, reverse=True)


def test_skipped_linears_and_narrow_ones_get_what_they_may() -> None:
    asked = budget(1, mixes=True, skipped="x")
    assert asked.options(asked.linears[0], 8) == (KEPT,)
    assert asked.options(asked.linears[1], 8) == (KEPT, 8, 4)
    assert asked.options(asked.linears[3], 8) == (KEPT, 8)
    assert replace(asked, mixes=False).options(asked.linears[1], 4) == (KEPT, 4)


def test_preset_paper_is_int8_of_the_decoder_alone() -> None:
    asked = replace(budget(1, mixes=True, tower=True), step=TinygptvConfig(method="tinygptv", preset="paper"))
    chosen = choose(asked, errors(0), 1e-5)
    assert set(chosen.bits.values()) == {8}
    assert chosen.tower == KEPT


@torch.inference_mode()
def test_errors_are_those_of_the_kernels_on_the_model_s_own_inputs(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", hidden=64, intermediate=128, head_dim=16, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(folder, resolve(checkpoint.config), checkpoint.tensors)
    step = TinygptvConfig(method="tinygptv", fit_bytes=1, outlier_threshold=1.5)
    hidden = model.embed(random_tokens(2, 24))
    measured, outputs = output_errors(model, step, hidden, 0)
    block = model.block(0, model.block_state(0))
    torch.testing.assert_close(outputs, model.forward(block, hidden, 0))
    seen: list[torch.Tensor] = []
    block.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.forward(block, hidden, 0)
    weight, inputs = block.mlp.down_proj.weight, seen[0].reshape(-1, 128)
    eight = Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=1.5).eval()
    eight.weight = Int8Params(weight.clone(), requires_grad=False).to("cpu")
    four = Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False).eval()
    four.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    want = inputs @ weight.T
    whole, by_eight, by_four = measured["mlp.down_proj"].tolist()
    assert whole == pytest.approx(float(want.double().square().sum()), rel=1e-6)
    assert by_eight == pytest.approx(float((eight(inputs) - want).double().square().sum()), rel=0.02)
    unpacked = torch.ops.bitsandbytes.dequantize_4bit(
        four.weight.data, four.weight.quant_state.absmax, 64, "nf4", [64, 128], torch.float32
    )
    exact = float((inputs @ unpacked.T - want).double().square().sum())
    assert by_four == pytest.approx(exact, rel=0.02)  # weights of bfloat16 are rounded to it
    assert by_eight < 0.1 * by_four


def test_parts_of_a_fused_linear_have_their_outputs_side_by_side() -> None:
    one = BlockLinear(0, "qkv", "qkv", ("q", "k"), 64, 64, None)
    asked = replace(budget(1, mixes=True), linears=(one,))
    parts = {"q": torch.tensor([3.0, 0.3, 0.6]).double(), "k": torch.tensor([1.0, 0.1, 1.0]).double()}
    assert squared_errors(asked, [parts])["qkv"] == pytest.approx({KEPT: 0.0, 8: 0.1, 4: 0.4})


def test_both_kinds_of_codes_beat_one_scale_for_the_whole_weight() -> None:
    """On correlated inputs; the methods of the linears are those of int8 and nf4."""
    from compression.methods.tinygptv import Tinygptv

    W, C = correlated(9)
    W = W * torch.logspace(-1, 1, len(W), dtype=W.dtype)[:, None]
    for bits, method in Tinygptv(config()).methods.items():
        got = method.solve(W, C, torch.float32).quantized.dequantized().double()
        assert relative_error(W, got, C) < 0.7 * relative_error(W, per_tensor(W, bits), C)
