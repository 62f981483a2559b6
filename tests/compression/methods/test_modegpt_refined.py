"""Mode refined: changes nothing where nothing is removed, repairs the stream, beats reference, resumes, refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.core.blockwise import compress_blocks
from compression.core.protocols import BlockResult
from compression.core.refit import TOO_FEW_CHUNKS
from compression.core.sensitivity import Metrics, walk_backward
from compression.core.streamed_model import StreamedModel
from compression.methods.modegpt import Modegpt
from compression.methods.modegpt_prices import price_block
from compression.methods.modegpt_refined import TwoStreams
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.shapes import block_costs, dense_shape, shapes_for
from tests.compression.test_pipeline import hashes, recipe, run
from tests.compression.walks import MemoryBlockStore, Walk, expected_logits, random_tokens, step
from tests.tiny_models import make_tiny_model, teach

KINDS = [
    ("llama", {"tied": True}),
    ("llama", {"bias": True, "kv_heads": 1}),
    ("mistral", {"kv_heads": 4, "head_dim": 10}),
    ("qwen2", {}),
]


def refined_walk(
    folder: Path, tokens: torch.Tensor, *, shapes: list[Any] | None = None, store: Any = None, **settings: Any
) -> tuple[Walk, TwoStreams]:
    config = step(mode="refined", layout="full", allocation="uniform", metric="plain", **settings)
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    size = family.dimensions(checkpoint.config)
    model = StreamedModel(folder, family, checkpoint.tensors)
    method = Modegpt(config, family, size, shapes or shapes_for(family, checkpoint.config, config))
    kept = store or MemoryBlockStore()
    walker = TwoStreams(model, method, model.embed(tokens), lambda _: None)
    reports = list(compress_blocks(model, walker, kept))
    return Walk(model, method, kept, reports, dict(checkpoint.config), tokens), walker


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_nothing_removed_is_nothing_changed(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Invariant 1: with full widths every re-fit's optimum is the original."""
    folder = make_tiny_model(tmp_path, kind, layers=3, **settings)
    checkpoint = open_checkpoint(folder)
    dense = dense_shape(resolve(checkpoint.config), checkpoint.config)
    done, _ = refined_walk(folder, random_tokens(16, 64), shapes=[dense] * 3)
    tokens = random_tokens(1, 24, seed=5)
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[0]
    got = expected_logits(done.model, done.method, done.store, tokens)
    torch.testing.assert_close(got, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_compressed_stream_is_what_the_written_blocks_compute(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """What calibrated block i+1 is what blocks 0…i of the artifact say, not something close to it."""
    folder = make_tiny_model(tmp_path, kind, layers=3, **settings)
    tokens = random_tokens(4, 64)
    done, walker = refined_walk(folder, tokens)
    with torch.inference_mode():
        hidden = done.model.embed(tokens)
        for index in range(3):
            shape = done.method.shapes[index].model_dump()
            block = done.model.resized_block(index, done.store.results[index].state, shape, done.method.scaling(index))
            hidden = done.model.forward(block, hidden, index)
        dense = done.model.embed(tokens)
        for index in range(3):
            dense = done.model.forward(done.model.block(index, done.model.block_state(index)), dense, index)
    torch.testing.assert_close(walker.compressed, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(walker.original, dense, rtol=1e-4, atol=1e-4)
    apart = float((hidden - dense).norm() / dense.norm())
    assert done.reports[-1].stream_error == pytest.approx(apart, rel=1e-3)


def test_error_correction_brings_the_stream_back(tmp_path: Path) -> None:
    """Each ingredient lowers the error of the calibration stream; all together most."""
    folder = make_tiny_model(tmp_path, "llama", layers=4, intermediate=96)
    teach(folder)
    tokens = random_tokens(24, 64)

    def apart(**settings: Any) -> float:
        return float(refined_walk(folder, tokens, sparsity=0.4, **settings)[0].reports[-1].stream_error)

    plain = apart(refit="local", input_refit=False, column_choice="leverage")
    corrected = apart(refit="error_corrected", input_refit=False, column_choice="leverage")
    everything = apart()
    assert corrected < plain
    assert everything < corrected


def test_resumed_is_straight(tmp_path: Path) -> None:
    """T25: both streams pass finished blocks to the bit."""
    folder = make_tiny_model(tmp_path, "qwen2", layers=4)
    tokens = random_tokens(6, 32)
    whole, _ = refined_walk(folder, tokens)
    half = MemoryBlockStore()
    half.results = {index: whole.store.results[index] for index in (0, 1)}
    resumed, _ = refined_walk(folder, tokens, store=half)
    for index in range(4):
        one: BlockResult = whole.store.results[index]
        for name, tensor in one.state.items():
            assert torch.equal(tensor, resumed.store.results[index].state[name]), (index, name)


def test_metrics_are_the_gradients_of_the_whole_model(tmp_path: Path) -> None:
    """The streamed backward pass against autograd through the stock model."""
    folder = make_tiny_model(tmp_path, "llama", layers=3, tied=True)
    family = resolve(open_checkpoint(folder).config)
    streamed = StreamedModel(folder, family)
    tokens = random_tokens(2, 40)
    found: dict[int, Metrics] = {}
    walk_backward(streamed, streamed.size, tokens, lambda index, _b, _i, _s, metrics: found.update({index: metrics}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    outputs: dict[str, torch.Tensor] = {}
    for index, block in enumerate(model.model.layers):
        for name, linear in (("attention", block.self_attn.o_proj), ("mlp", block.mlp.down_proj)):
            linear.register_forward_hook(lambda _m, _i, out, key=f"{index}.{name}": outputs.update({key: out}))
    logits = model(tokens).logits[:, :-1].reshape(-1, 384)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="sum")
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    for index in range(3):
        for name in ("attention", "mlp"):
            g = gradients[f"{index}.{name}"].double().reshape(-1, 32)
            torch.testing.assert_close(getattr(found[index], name), g.T @ g / 80, rtol=1e-3, atol=1e-8)


def test_prices_rise_with_what_is_removed_and_start_at_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", layers=2, head_dim=16, intermediate=96)
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    size, costs = family.dimensions(checkpoint.config), block_costs(family, checkpoint.config)
    streamed = StreamedModel(folder, family)
    config = step(mode="refined", layout="full", round_to=8)
    method = Modegpt(config, family, size, shapes_for(family, checkpoint.config, config))
    names = ("mlp", "query_key", "value_output")
    lists: dict[int, Any] = {}

    def visit(index: int, block: Any, inputs: Any, statistics: Any, metrics: Any) -> None:
        lists[index] = price_block(streamed, method, costs, names, index, block, inputs, statistics, metrics)

    walk_backward(streamed, size, random_tokens(4, 64), visit)
    for of_block in lists.values():
        for module in names:
            one = of_block[module]
            assert one.prices[0] == one.saved[0] == 0
            assert list(one.prices) == sorted(one.prices)
            assert list(one.widths) == sorted(one.widths, reverse=True)
            assert one.prices[-1] > 0
        assert of_block["mlp"].saved[-1] == (96 - of_block["mlp"].widths[-1]) * costs.per_mlp_unit


def test_refined_loses_less_than_reference_on_a_model_that_has_learned(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", layers=4, intermediate=96, hidden=48)
    teach(folder)
    settings = {
        "calibration": {"num_samples": 200, "sequence_length": 48},
        "evaluation": {"num_windows": 100, "sequence_length": 48, "generation_tokens": 0},
    }
    base = {"layout": "full", "sparsity": 0.4, "round_to": 4}
    reports = {
        mode: run(folder, tmp_path / mode / "out", recipe({**base, "mode": mode}, **settings))
        for mode in ("reference", "refined")
    }
    for report in reports.values():
        assert report.block_parameters.after / report.block_parameters.before == pytest.approx(0.6, abs=0.015)
    assert reports["refined"].perplexity.after < reports["reference"].perplexity.after


def test_reports_answer_for_every_refit(tmp_path: Path) -> None:
    """The ridge of each part is named; with too little text to hold any out, the fixed one is a named fallback."""
    folder = make_tiny_model(tmp_path, "llama", layers=3)
    enough, _ = refined_walk(folder, random_tokens(4 * 32, 64))  # four chunks of 2,048 tokens
    little, _ = refined_walk(folder, random_tokens(4, 64))
    for reports, fallback in ((enough.reports, None), (little.reports, TOO_FEW_CHUNKS)):
        for report in reports:
            for module in report.modules:
                if (report.block, module.module) == (0, "query_key"):
                    assert module.ridge is None  # block 0 reads the same stream in both: nothing was re-fitted
                else:
                    assert module.ridge is not None
                    assert module.fallback == fallback


@pytest.mark.parametrize("layout", ["portable", "full"])
def test_a_cut_run_resumes_to_the_same_artifact(tmp_path: Path, layout: str) -> None:
    from compression.core.protocols import Cancelled
    from tests.compression.test_pipeline import StopAfter

    folder = make_tiny_model(tmp_path / "in", "llama", layers=4)
    asked = recipe({"mode": "refined", "layout": layout})
    run(folder, tmp_path / "whole" / "out", asked)
    with pytest.raises(Cancelled):
        run(folder, tmp_path / "cut" / "out", asked, sink=StopAfter(2))
    run(folder, tmp_path / "cut" / "out", asked)
    assert hashes(tmp_path / "cut" / "out") == hashes(tmp_path / "whole" / "out")
