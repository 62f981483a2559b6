"""A compressed block computes what its decomposition says: parity with the dense model whose weights are masked.

The reference never uses our runtime: it is the stock model with rows of query/key zeroed, V/O replaced by the dense
product of the factors, and MLP columns zeroed. Swapping a head, a pair or a transpose anywhere breaks it.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.methods.modegpt import channels_of
from compression.reload import expected_logits
from preflight.shapes import dense_shape
from tests.compression.walks import Walk, random_tokens, step, walk
from tests.tiny_models import make_tiny_model

CASES = [
    ("llama", {"kv_heads": 2, "tied": True}),
    ("llama", {"kv_heads": 1, "bias": True}),
    ("llama", {"kv_heads": 4, "head_dim": 10, "hidden": 24, "intermediate": 37}),
    ("mistral", {"kv_heads": 2}),
    ("qwen2", {"kv_heads": 2}),
    ("qwen2", {"kv_heads": 1, "layers": 3}),
]


def masked_reference(folder: Path, done: Walk) -> torch.nn.Module:
    """The stock model whose dense weights compute what the compressed blocks compute."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = done.method.size
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            state = done.store.results[index].state
            attention, mlp = block.self_attn, block.mlp
            pairs = state["self_attn.rotary_pairs"]
            keep = torch.zeros(size.kv_heads, size.head_dim, dtype=torch.bool)
            keep.scatter_(1, channels_of(pairs, size.head_dim), value=True)
            for linear, mask in (
                (attention.q_proj, keep.repeat_interleave(size.group, 0)),
                (attention.k_proj, keep),
            ):
                linear.weight *= mask.reshape(-1, 1)
                if linear.bias is not None:
                    linear.bias *= mask.reshape(-1)
            _fill_value_output(attention, state, size)
            mlp.down_proj.weight.copy_(_dense_down(mlp, state))
    return model


def _fill_value_output(attention, state, size) -> None:
    """Put `basis` back by least squares: v' = v B, so B is what maps the old value rows to the new ones."""
    new_v = state["self_attn.v_proj.weight"].reshape(size.kv_heads, -1, size.hidden)
    old_v = attention.v_proj.weight.reshape(size.kv_heads, size.head_dim, size.hidden)
    new_o = state["self_attn.o_proj.weight"].reshape(size.hidden, size.kv_heads, size.group, -1)
    dense_o = torch.empty(size.hidden, size.kv_heads, size.group, size.head_dim)
    for head in range(size.kv_heads):
        basis = torch.linalg.lstsq(old_v[head].T.double(), new_v[head].T.double()).solution
        dense_o[:, head] = (new_o[:, head].double() @ basis.T).float()
    attention.o_proj.weight.copy_(dense_o.reshape(size.hidden, -1))


def _dense_down(mlp, state) -> torch.Tensor:
    """Columns of the new down projection at the places of the units whose rows were kept."""
    kept = [int((mlp.up_proj.weight == row).all(dim=1).nonzero()[0]) for row in state["mlp.up_proj.weight"]]
    down = torch.zeros_like(mlp.down_proj.weight)
    down[:, kept] = state["mlp.down_proj.weight"]
    return down


@pytest.mark.parametrize("propagation", ["dense", "sequential"])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_layout_full_computes_its_decomposition(tmp_path: Path, kind: str, settings: dict, propagation: str) -> None:
    """T11, T34: grouped, multi-query and multi-head attention, biases, odd sizes; logits keep the original scale."""
    folder = make_tiny_model(tmp_path, kind, **settings)
    done = walk(folder, step(layout="full", propagation=propagation), random_tokens(8, 32))
    tokens = random_tokens(1, 24, seed=5)
    got = expected_logits(done.model, done.method, done.store, tokens)
    with torch.inference_mode():
        reference = masked_reference(folder, done)(tokens).logits[0]
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
