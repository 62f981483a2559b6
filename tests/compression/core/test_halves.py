"""A block run by halves is the block, in every family; what output linears are silent about is what is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.core.halves import Halves, Heard
from compression.core.statistics import BlockStatistics
from compression.core.streamed_model import StreamedModel
from compression.core.taps import silenced
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from tests.compression.kinds import CASES
from tests.compression.walks import random_tokens
from tests.tiny_models import make_tiny_model

EVERY = pytest.mark.parametrize(("kind", "settings"), CASES)


def loaded(folder: Path, kind: Any, settings: dict[str, Any]) -> tuple[StreamedModel, Any, torch.Tensor]:
    make_tiny_model(folder, kind, **settings)
    model = StreamedModel(folder, resolve(open_checkpoint(folder).config))
    return model, model.block(1, model.block_state(1)), model.embed(random_tokens(3, 20))


@EVERY
@torch.inference_mode()
def test_both_halves_are_the_block(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    model, block, hidden = loaded(tmp_path, kind, settings)
    halves = Halves(model)
    middle = halves.half_way(block, hidden, 1)
    whole = model.forward(block, hidden, 1)
    assert torch.equal(halves.finish(block, middle, 1), whole)
    assert (middle is hidden) == halves.parallel
    assert torch.equal(model.forward(block, hidden, 1), whole)  # the block's own modules are back


@EVERY
@torch.inference_mode()
def test_what_is_silent_is_what_is_missing(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    """rest + s·P(L(a)) is the stream with the half in it, by the family's own norm and scale; of experts the sum."""
    model, block, hidden = loaded(tmp_path, kind, settings)
    halves, family = Halves(model), model.family
    scale = {"granite": 0.7}.get(kind, 1.0)  # tests.tiny_models, away from the table
    through = [torch.nn.Identity(), torch.nn.Identity()]
    if kind.startswith("gemma"):
        through = [block.post_attention_layernorm, block.post_feedforward_layernorm]
    middle, whole = halves.half_way(block, hidden, 1), model.forward(block, hidden, 1)
    attention = halves.without_attention_output(block, hidden, 1)
    said = block.get_submodule(family.attention.output)(attention.inputs[family.attention.output])
    torch.testing.assert_close(attention.rest + scale * through[0](said), whole if halves.parallel else middle)
    mlp = halves.without_mlp_output(block, middle, 1)
    said = torch.zeros(hidden[..., 0].numel(), hidden.shape[-1])
    for expert, names in enumerate(family.mlps(model.size)):
        if names.down in mlp.inputs:
            routed = mlp.routed(expert)
            said[routed.rows] += routed.weight * block.get_submodule(names.down)(mlp.inputs[names.down]).flatten(0, -2)
    torch.testing.assert_close(mlp.rest + scale * through[1](said.view_as(hidden)), whole)


@EVERY
@torch.inference_mode()
def test_mlp_inputs_are_what_its_first_linear_reads(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    model, block, hidden = loaded(tmp_path, kind, settings)
    seen: list[torch.Tensor] = []
    block.get_submodule(model.family.mlp_entry).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model.forward(block, hidden, 1)
    halves = Halves(model)
    got = halves.mlp_inputs(block, halves.half_way(block, hidden, 1), 1)
    assert torch.equal(got.flatten(0, -2), seen[0].flatten(0, -2))


@EVERY
@torch.inference_mode()
def test_who_listens_to_silenced_linears_hears_the_same(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    """The walk of mode reference leaves out the down projections where nobody needs the block's outputs."""
    model, block, hidden = loaded(tmp_path, kind, settings)
    downs = [mlp.down for mlp in model.family.mlps(model.size)]
    whole, short = BlockStatistics(model.family, model.size), BlockStatistics(model.family, model.size)
    with whole.watching(block):
        output = model.forward(block, hidden, 1)
    with short.watching(block), silenced(block, downs):
        assert not torch.equal(model.forward(block, hidden, 1), output)
    for name in ("value", "query", "key"):
        assert torch.equal(getattr(short, name).energy(), getattr(whole, name).energy())
    for one, other in zip(short.experts, whole.experts, strict=True):
        assert torch.equal(one.mean(), other.mean())
    assert torch.equal(model.forward(block, hidden, 1), output)


def test_shares_of_a_correction_add_up_and_are_the_smallest() -> None:
    chosen, weights = torch.tensor([[2, 0], [1, 2], [0, 1]]), torch.tensor([[0.9, 0.3], [0.5, 0.5], [0.7, 0.1]])
    heard = Heard(torch.zeros(1, 3, 4), {}, chosen, weights)
    total, shares = torch.zeros(3, 1), torch.zeros(3, 3)
    for expert in range(3):
        routed = heard.routed(expert)
        assert routed.rows.tolist() == [token for token in range(3) if expert in chosen[token]]
        total[routed.rows] += routed.weight * routed.share
        shares[routed.rows, expert] = routed.share[:, 0]
    torch.testing.assert_close(total, torch.ones(3, 1))
    by_expert = torch.zeros(3, 3).scatter(1, chosen, weights)
    for token in range(3):
        least = torch.linalg.pinv(by_expert[token][None])[:, 0]
        torch.testing.assert_close(shares[token], least)
