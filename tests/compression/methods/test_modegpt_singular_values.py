"""Where the singular values of value and output go: no output changes, and rounding errors do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.core.grid import Quantized
from compression.core.linear_walk import relative_error
from compression.methods.modegpt_decompositions import value_factors, value_output
from compression.methods.round_to_nearest import round_to_nearest
from tests.compression.methods.test_modegpt_refined import refined_walk
from tests.compression.walks import Walk, expected_logits, random_tokens, step, walk
from tests.tiny_models import make_tiny_model

PLACES = ("output", "balanced", "value")


def compressed(folder: Path, mode: str, place: str) -> Walk:
    """A tiny model with values narrowed to five channels of eight."""
    tokens = random_tokens(16, 48)
    settings: dict[str, Any] = {"modules": ["value_output"], "sparsity": 0.08, "singular_values": place}
    if mode == "refined":
        return refined_walk(folder, tokens, **settings)[0]
    return walk(folder, step(layout="full", **settings), tokens)


@pytest.mark.parametrize("mode", ["reference", "refined"])
@pytest.mark.parametrize(("kind", "settings"), [("qwen2", {}), ("llama", {"kv_heads": 1, "bias": True})])
def test_no_output_depends_on_their_place(tmp_path: Path, mode: str, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path, kind, **settings)
    done = {place: compressed(folder, mode, place) for place in PLACES}
    assert done["output"].method.shapes[0].value_output_rank < 8
    tokens = random_tokens(1, 40, seed=9)
    logits = {place: expected_logits(one.model, one.method, one.store, tokens) for place, one in done.items()}
    for place in ("balanced", "value"):
        torch.testing.assert_close(logits[place], logits["output"], rtol=1e-3, atol=1e-3)
        name = "self_attn.o_proj.weight"
        weights = [done[key].store.results[0].state[name] for key in (place, "output")]
        assert not torch.allclose(*weights, rtol=1e-2)


def test_in_value_the_outputs_channels_are_alike_and_in_output_the_values_are(tmp_path: Path) -> None:
    """Orthonormal rows of V₂ᵀ, or unit energy of the new values: the two ends; by their roots both have a half."""
    folder = make_tiny_model(tmp_path, "llama", kv_heads=1)
    done = {place: compressed(folder, "reference", place) for place in PLACES}
    norms = {}
    for place, one in done.items():
        output = one.store.results[0].state["self_attn.o_proj.weight"]  # [d, heads · rank]
        norms[place] = output.reshape(32, 4, -1).square().sum(dim=(0, 1)).sqrt()
    spread = {place: float(norm.max() / norm.min()) for place, norm in norms.items()}
    assert spread["value"] == pytest.approx(1, abs=1e-4)
    assert spread["balanced"] ** 2 == pytest.approx(spread["output"], rel=1e-3)
    assert spread["output"] > 1.1


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlation of values whose directions differ tenfold in size, and outputs of one head."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -1.5, 64, dtype=torch.float64)
    v = torch.randn(4000, 64, generator=generator, dtype=torch.float64) * sizes
    return v.T @ v / 4000, torch.randn(1, 96, 64, generator=generator, dtype=torch.float64)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    quantized: Quantized = round_to_nearest(weight, 4, 32, torch.float32)
    return quantized.dequantized().double()


def test_rounded_outputs_lose_least_when_the_values_hold_the_sizes() -> None:
    G, O = problem()  # noqa: E741
    solved = value_output(G, O, 32)
    errors = []
    for place in PLACES:
        factors = value_factors(solved.singular_values, place)
        basis, output = solved.basis * factors, solved.output[0] / factors
        errors.append(relative_error(output, rounded(output), basis.T @ G @ basis))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.8 * errors[0]


def test_a_factor_of_a_value_channel_goes_into_its_scales() -> None:
    """Only o_proj's channels share scales across sizes; a row of v_proj has its own. Powers of two: nothing rounds."""
    value = torch.randn(32, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = 2.0 ** torch.arange(-16, 16, dtype=torch.float64)
    plain, scaled = (round_to_nearest(weight, 4, 32, torch.float64) for weight in (value, value * factors[:, None]))
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scale * factors[:, None], scaled.scale)


def test_channels_without_energy_stay_finite() -> None:
    assert bool(torch.isfinite(1 / value_factors(torch.tensor([2.0, 0.0]).double(), "value")).all())
    assert value_factors(torch.zeros(2).double(), "value").tolist() == [1.0, 1.0]
