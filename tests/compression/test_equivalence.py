"""A compressed block computes what its decomposition says: parity with the dense model whose weights are masked.

The reference never uses our runtime: it is the stock model with rows of query/key zeroed or projected, V/O replaced by
the dense product of the factors, and MLP columns zeroed. Swapping a head, a pair or a transpose anywhere breaks it.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.methods.modegpt_decompositions import channels_of
from preflight.shapes import dense_shape
from tests.compression.kinds import CASES
from tests.compression.stock_views import views
from tests.compression.walks import Walk, expected_logits, random_tokens, step, walk
from tests.tiny_models import make_tiny_model


def masked_reference(folder: Path, kind: str, done: Walk) -> torch.nn.Module:
    """The stock model whose dense weights compute what the compressed blocks compute."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    size, family = done.method.size, done.model.family
    for index, block in enumerate(model.get_submodule(family.blocks)):
        state, stock = done.store.results[index].state, views(kind, block, size)
        new = {
            name: by_new_head(state, getattr(family.attention, name), size, heads)
            for name, heads in (("query", size.heads), ("key", size.kv_heads), ("value", size.kv_heads))
        }
        _fill_query_key(stock, new, state.get(f"{family.attention.module}.rotary_pairs"), size, size.rotary_in(index))
        _fill_value_output(stock, new["value"], state[f"{family.attention.output}.weight"], size)
        for mlp, (up, down) in zip(family.mlps(size), stock.mlps, strict=True):
            kept = [int((up == row).all(dim=1).nonzero()[0]) for row in state[f"{mlp.up}.weight"]]
            down.zero_()
            down[:, kept] = state[f"{mlp.down}.weight"]
    return model


def by_new_head(state, linear: str, size, heads: int) -> torch.Tensor:
    """Weights with biases as a last column, `[heads, rank, hidden + 1]` in float64."""
    weight = state[f"{linear}.weight"].double()
    bias = state.get(f"{linear}.bias", torch.zeros(len(weight))).double()
    return torch.cat((weight, bias[:, None]), dim=1).reshape(heads, -1, size.hidden + 1)


def with_bias(pair) -> torch.Tensor:
    weight, bias = pair
    column = torch.zeros(weight.shape[:2]) if bias is None else bias
    return torch.cat((weight, column[..., None]), dim=2).double()


def _fill_query_key(stock, new, pairs, size, width: int) -> None:
    """Zero the rotated channels that went; put the projections of the others into the query as one dense map."""
    rotated = 0 if pairs is None else 2 * pairs.shape[1]
    old_query, old_key = with_bias(stock.query), with_bias(stock.key)
    for head in range(size.kv_heads):
        mine = slice(head * size.group, (head + 1) * size.group)
        keep = torch.zeros(size.head_dim, dtype=torch.bool)
        if rotated:
            keep[channels_of(pairs[head], width)] = True
            chosen = channels_of(pairs[head], width)
            torch.testing.assert_close(new["key"][head, :rotated], old_key[head, chosen], rtol=0, atol=0)
            torch.testing.assert_close(new["query"][mine, :rotated], old_query[mine][:, chosen], rtol=0, atol=0)
        dense = torch.zeros(size.head_dim, size.head_dim, dtype=torch.float64)
        dense[keep, keep] = 1.0
        if width < size.head_dim:
            A = factor(old_query[mine, width:], new["query"][mine, rotated:])
            B = factor(old_key[head : head + 1, width:], new["key"][head : head + 1, rotated:])
            dense[width:, width:] = B @ A.T  # q' k'ᵀ = q A Bᵀ kᵀ
        filled = torch.einsum("cr,grd->gcd", dense, old_query[mine])
        stock.query[0][mine] = filled[..., :-1].float()
        if stock.query[1] is not None:
            stock.query[1][mine] = filled[..., -1].float()


def factor(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The one map `[channels, rank]` with `new = mapᵀ old` for all heads given, biases included; it must exist."""
    left, right = old.transpose(0, 1).flatten(1).T, new.transpose(0, 1).flatten(1).T
    solution = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(left @ solution, right, rtol=1e-4, atol=1e-4)
    return solution


def _fill_value_output(stock, new_value, new_output, size) -> None:
    """Put `basis` back by least squares: v' = v B, so B is what maps the old value rows to the new ones."""
    heads = new_output.double().reshape(size.hidden, size.kv_heads, size.group, -1)
    old = with_bias(stock.value)
    for head in range(size.kv_heads):
        basis = factor(old[head : head + 1], new_value[head : head + 1])
        dense = heads[:, head] @ basis.T
        stock.output[:, head * size.group : (head + 1) * size.group] = dense.float()


@pytest.mark.parametrize("propagation", ["dense", "sequential"])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_layout_full_computes_its_decomposition(tmp_path: Path, kind: str, settings: dict, propagation: str) -> None:
    """T11, T34: grouped, multi-query and multi-head attention, biases, odd sizes; logits keep the original scale."""
    folder = make_tiny_model(tmp_path, kind, **settings)
    done = walk(folder, step(layout="full", propagation=propagation), random_tokens(8, 32))
    tokens = random_tokens(1, 24, seed=5)
    got = expected_logits(done.model, done.method, done.store, tokens)
    with torch.inference_mode():
        reference = masked_reference(folder, kind, done)(tokens).logits[0]
    torch.testing.assert_close(got, reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_full_rank_leaves_the_logits_alone(tmp_path: Path, kind: str, settings: dict) -> None:
    """Invariant 1: nothing is removed, nothing changes."""
    folder = make_tiny_model(tmp_path, kind, **settings)
    config = step(layout="full")
    probe = walk(folder, config, random_tokens(4, 32))
    dense = dense_shape(probe.model.family, probe.config)
    done = walk(folder, config, random_tokens(4, 32), shapes=[dense] * probe.model.blocks)
    tokens = random_tokens(1, 24, seed=5)
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[0]
    got = expected_logits(done.model, done.method, done.store, tokens)
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)
    assert all(report.relative_output_error < 1e-5 for report in done.reports)


def test_pair_energies_do_not_change_under_rotation(tmp_path: Path) -> None:
    """Invariant 6: the scores are the same before and after the rotary embedding."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    folder = make_tiny_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    q = torch.randn(1, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(model.config)(q, torch.arange(30)[None])
    turned, _ = apply_rotary_pos_emb(q, q, cos, sin)

    def energy(x: torch.Tensor) -> torch.Tensor:
        squares = x.square().sum(dim=2)[0]
        return squares[:, :4] + squares[:, 4:]

    torch.testing.assert_close(energy(turned), energy(q), rtol=1e-4, atol=1e-4)


def test_pair_scores_are_the_energies_of_query_and_key(tmp_path: Path) -> None:
    """Invariant 6: s = √(E_k(p) Σ_heads E_q(p)), recomputed here from the model's own linears in float64."""
    from compression.core.blockwise import profile
    from compression.core.streamed_model import StreamedModel
    from preflight.checkpoint import open_checkpoint
    from preflight.families import resolve

    folder = make_tiny_model(tmp_path, "qwen2")
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    size = family.dimensions(checkpoint.config)
    streamed = StreamedModel(folder, family, checkpoint.tensors)
    tokens = random_tokens(2, 16)
    scores = profile(streamed, size, streamed.embed(tokens), lambda _: None)[0].pair_scores()
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
        attention = model.model.layers[0].self_attn
        q = attention.q_proj(x).reshape(-1, 4, 8)
        k = attention.k_proj(x).reshape(-1, 2, 8)
    for head in range(2):
        for pair in range(4):
            channels = [pair, pair + 4]
            of_query = float((q[:, 2 * head : 2 * head + 2][..., channels] ** 2).sum() / len(q))
            of_key = float((k[:, head][..., channels] ** 2).sum() / len(k))
            assert float(scores[head, pair]) == pytest.approx((of_query * of_key) ** 0.5, rel=1e-4)


def test_block_store_decides_what_is_solved_again(tmp_path: Path) -> None:
    """T25: a walk that finds blocks 0..k finished gives the same tensors as one that finds none."""
    folder = make_tiny_model(tmp_path, "llama", layers=4)
    config, tokens = step(layout="full"), random_tokens(6, 32)
    whole = walk(folder, config, tokens)
    half = walk(folder, config, tokens)
    for index in (2, 3):
        del half.store.results[index]
    resumed = walk(folder, config, tokens, store=half.store)
    for index in range(4):
        for name, tensor in whole.store.results[index].state.items():
            assert torch.equal(tensor, resumed.store.results[index].state[name]), (index, name)


def test_sequential_and_dense_statistics_differ_after_the_first_block(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", layers=3)
    tokens = random_tokens(6, 32)
    dense = walk(folder, step(layout="full", propagation="dense"), tokens)
    sequential = walk(folder, step(layout="full", propagation="sequential"), tokens)
    same = [
        torch.equal(
            dense.store.results[i].state["mlp.down_proj.weight"],
            sequential.store.results[i].state["mlp.down_proj.weight"],
        )
        if dense.store.results[i].state["mlp.down_proj.weight"].shape
        == sequential.store.results[i].state["mlp.down_proj.weight"].shape
        else False
        for i in range(3)
    ]
    assert same == [True, False, False]
