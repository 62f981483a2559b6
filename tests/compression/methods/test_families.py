"""What some families need beyond the plain three types: projection of unrotated query-key, experts by routed tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.core.blockwise import chunks
from compression.core.statistics import BlockStatistics, RunningGram
from compression.methods.modegpt_decompositions import by_weight_norm, project_query_key
from preflight.families import resolve
from preflight.shapes import shapes_for
from tests.compression.walks import Walk, random_tokens, step, walk
from tests.tiny_models import make_tiny_model


def states(tokens: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_projection_is_the_best_of_its_rank(rank: int) -> None:
    """Against the truncated SVD of the logits themselves, `q kᵀ` over all pairs of tokens: Eckart–Young."""
    q, k = states(40, 6, 0), states(30, 6, 1)
    solved = project_query_key(q.T @ q, k.T @ k, rank)
    logits, ours = q @ k.T, (q @ solved.query) @ (k @ solved.key).T
    U, S, Vt = torch.linalg.svd(logits)
    torch.testing.assert_close(ours, (U[:, :rank] * S[:rank]) @ Vt[:rank], rtol=1e-8, atol=1e-8)
    assert solved.lost == pytest.approx(float((logits - ours).square().sum()), rel=1e-6, abs=1e-6)
    assert solved.whole == pytest.approx(float(logits.square().sum()))


def test_what_all_keys_share_takes_no_rank() -> None:
    """A constant added to every key moves all logits of a query alike: the projection is the same without it."""
    k = states(50, 6, 3)
    plain, shifted = RunningGram(1, 6), RunningGram(1, 6)
    plain.add(k.float())
    shifted.add(k.float() + 5.0)
    torch.testing.assert_close(shifted.covariance(), plain.covariance(), rtol=1e-3, atol=1e-3)
    assert float(shifted.mean()[0].trace()) > float(plain.mean()[0].trace())


def test_query_key_of_unrotated_heads_keeps_the_logits_where_their_rank_is_low(tmp_path: Path) -> None:
    """OPT with query rows of rank 4 in heads of 8 channels: half of the rank loses nothing, biases included."""
    folder = make_tiny_model(tmp_path, "opt", bias=True)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "q_proj" in name:
            heads = tensor.reshape(4, 8, -1)
            heads[:, 4:] = heads[:, :4]
            tensors[name] = heads.reshape(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = step(layout="full", modules=["query_key"], sparsity=0.05)
    done = walk(folder, config, random_tokens(8, 32))
    size = done.method.size
    assert done.method.shapes[0].query_key_rank < size.head_dim
    shapes = [shape.model_copy(update={"query_key_rank": 4}) for shape in done.method.shapes]
    done = walk(folder, config, random_tokens(8, 32), shapes=shapes)
    assert all(report.relative_output_error < 1e-3 for report in done.reports)


@pytest.mark.parametrize(("kind", "settings"), [("smollm3", {"no_rope_layers": [0, 1]}), ("phi", {}), ("gpt2", {})])
def test_each_head_is_projected_by_its_own_statistics(tmp_path: Path, kind: Any, settings: dict) -> None:
    """Query and key rows of every head against a projection from that head's activations, collected here anew."""
    folder = make_tiny_model(tmp_path, kind, **settings)
    tokens = random_tokens(6, 32)
    done = walk(folder, step(layout="full", sparsity=0.4), tokens)
    size, attention = done.method.size, done.model.family.attention
    old, new = done.model.block_state(0), done.store.results[0].state
    width, rotated = size.rotary_in(0), size.rotary_rank(0, done.method.shapes[0].query_key_rank)
    block = done.model.block(0, old)
    seen: dict[str, torch.Tensor] = {}
    for name in (attention.query, attention.key):
        block.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.inference_mode():
        done.model.forward(block, done.model.embed(tokens), 0)
    q, k = (
        seen[name].double().reshape(-1, size.kv_heads, heads // size.kv_heads, size.head_dim)[..., width:]
        for name, heads in ((attention.query, size.heads), (attention.key, size.kv_heads))
    )
    k = k - k.mean(dim=0)
    rank = done.method.shapes[0].query_key_rank
    for head in range(size.kv_heads):
        mine, one = q[:, head].flatten(0, 1), k[:, head, 0]
        solved = project_query_key(mine.T @ mine, one.T @ one, rank - rotated)
        key_rows = new[f"{attention.key}.weight"].double().reshape(size.kv_heads, rank, -1)[head, rotated:]
        old_key = old[f"{attention.key}.weight"].double().reshape(size.kv_heads, size.head_dim, -1)[head, width:]
        for query in range(head * size.group, (head + 1) * size.group):
            query_rows = new[f"{attention.query}.weight"].double().reshape(size.heads, rank, -1)[query, rotated:]
            rows = old[f"{attention.query}.weight"].double().reshape(size.heads, size.head_dim, -1)[query, width:]
            expected = rows.T @ solved.query @ solved.key.T @ old_key
            torch.testing.assert_close(query_rows.T @ key_rows, expected, rtol=1e-3, atol=1e-4)


def starve(folder: Path) -> None:
    """Let the routers be v, −v and 0: of one expert per token, one of the first two always wins."""
    tensors = load_file(folder / "model.safetensors")
    for name, router in tensors.items():
        if name.endswith(".gate.weight"):
            router[1], router[2:] = -router[0], 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_expert_without_tokens_falls_back_by_name(tmp_path: Path, kind: Any) -> None:
    folder = make_tiny_model(tmp_path, kind, num_experts_per_tok=1, seed=1)
    starve(folder)
    done = walk(folder, step(layout="full", modules=["mlp"]), random_tokens(8, 64))
    size, family = done.method.size, done.model.family
    for index, report in enumerate(done.reports):
        mlp = next(module for module in report.modules if module.module == "mlp")
        assert mlp.coverage is not None
        assert mlp.coverage[2:] == (0,) * (size.experts - 2)
        assert sum(mlp.coverage) == 8 * 64
        assert min(mlp.coverage[:2]) > mlp.width_after
        unseen = ", ".join(map(str, range(2, size.experts)))
        assert mlp.fallback is not None
        assert mlp.fallback.startswith(f"experts {unseen} saw fewer")
        old, new = done.model.block_state(index), done.store.results[index].state
        for names in family.mlps(size)[2:]:
            inputs = [old[f"{name}.weight"] for name in names.inputs]
            kept = by_weight_norm(inputs, old[f"{names.down}.weight"], mlp.width_after)
            assert torch.equal(new[f"{names.down}.weight"], old[f"{names.down}.weight"][:, kept])
            assert torch.equal(new[f"{names.up}.weight"], old[f"{names.up}.weight"][kept])


def test_experts_are_solved_on_their_own_tokens(tmp_path: Path) -> None:
    """The correlation of each expert is that of the tokens which the router sends to it, and of no others."""
    folder = make_tiny_model(tmp_path, "mixtral")
    done: Walk = walk(folder, step(layout="full"), random_tokens(2, 16))
    model, family, size = done.model, done.model.family, done.method.size
    statistics = BlockStatistics(family, size)
    block = model.block(0, model.block_state(0))
    hidden = model.embed(random_tokens(2, 16))
    seen: list[torch.Tensor] = []
    block.get_submodule("mlp.gate").register_forward_hook(lambda _m, inputs, out: seen.extend((inputs[0], out[2])))
    with torch.inference_mode(), statistics.watching(block):
        for part in chunks(hidden):
            model.forward(block, hidden[part], 0)
    inputs, chosen = seen
    state = model.block_state(0)
    for expert, names in enumerate(family.mlps(size)):
        own = inputs.reshape(-1, size.hidden)[(chosen == expert).any(dim=1)]
        units = torch.nn.functional.silu(own @ state[f"{names.gate}.weight"].T) * (own @ state[f"{names.up}.weight"].T)
        expected = units.double().T @ units.double() / len(own)
        torch.testing.assert_close(statistics.experts[expert].mean()[0], expected, rtol=1e-4, atol=1e-4)


def test_all_parts_of_a_mixture_meet_the_budget(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "mixtral", intermediate=200)
    config = step(layout="full", sparsity=0.3)
    done = walk(folder, config, random_tokens(4, 32))
    family = resolve(done.config)
    assert list(done.method.shapes) == list(shapes_for(family, done.config, config))
    kept = sum(report.parameters.after for report in done.reports)
    whole = sum(report.parameters.before for report in done.reports)
    assert 1 - kept / whole == pytest.approx(0.3, abs=0.01)
