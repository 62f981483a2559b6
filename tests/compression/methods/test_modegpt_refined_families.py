"""Mode refined on every family: what the contract of the walk promises, whatever the form of the blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.core.halves import Heard
from compression.core.refit import refit
from compression.core.selection import FLOOR, removal_order
from compression.core.sensitivity import Metrics, walk_backward
from compression.core.statistics import RunningInfluence
from compression.core.streamed_model import StreamedModel
from compression.core.taps import run_until
from compression.methods.modegpt import Modegpt
from compression.methods.modegpt_decompositions import project_query_key
from compression.methods.modegpt_prices import price_block
from compression.methods.modegpt_refined import TwoStreams
from compression.methods.modegpt_refined_mlp import expert_targets
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from preflight.shapes import block_costs, dense_shape, modules_of, shapes_for
from tests.compression.kinds import CASES
from tests.compression.methods.test_families import starve
from tests.compression.methods.test_modegpt_refined import refined_walk
from tests.compression.walks import MemoryBlockStore, expected_logits, random_tokens, step, walk
from tests.tiny_models import make_tiny_model

# One of each kind of block.
FAMILIES = [next(case for case in CASES if case[0] == kind) for kind in dict(CASES)]
FAMILIES.append(("gpt_neox", {"heads": 4, "use_parallel_residual": False}))


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_nothing_removed_is_nothing_changed(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    """Invariant 1: with full widths every re-fit's optimum is the original."""
    folder = make_tiny_model(tmp_path, kind, **settings)
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    shapes = [dense_shape(family, checkpoint.config)] * family.block_count(checkpoint.config)
    done, _ = refined_walk(folder, random_tokens(16, 64), shapes=shapes)
    tokens = random_tokens(1, 24, seed=5)
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[0]
    got = expected_logits(done.model, done.method, done.store, tokens)
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_the_compressed_stream_is_what_the_written_blocks_compute(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    """What calibrated block i+1 is what blocks 0…i of the artifact say; a resumed walk gives the same bits."""
    folder = make_tiny_model(tmp_path, kind, **settings)
    tokens = random_tokens(6, 64)
    done, walker = refined_walk(folder, tokens)
    count = done.model.blocks
    with torch.inference_mode():
        hidden, dense = done.model.embed(tokens), done.model.embed(tokens)
        for index in range(count):
            shape = done.method.shapes[index].model_dump()
            block = done.model.resized_block(index, done.store.results[index].state, shape, done.method.scaling(index))
            hidden = done.model.forward(block, hidden, index)
            dense = done.model.forward(done.model.block(index, done.model.block_state(index)), dense, index)
    torch.testing.assert_close(walker.compressed, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(walker.original, dense, rtol=1e-4, atol=1e-4)
    half = MemoryBlockStore()
    half.results = {index: done.store.results[index] for index in range(count - 1)}
    resumed, _ = refined_walk(folder, tokens, store=half)
    for name, tensor in done.store.results[count - 1].state.items():
        assert torch.equal(tensor, resumed.store.results[count - 1].state[name]), name


def at_second_block(folder: Path, tokens: torch.Tensor, **settings: Any) -> tuple[TwoStreams, Any]:
    """A walk that stands before block 1, with streams that differ, and the original block."""
    config = step(mode="refined", layout="full", allocation="uniform", metric="plain", **{"sparsity": 0.4, **settings})
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    model = StreamedModel(folder, family, checkpoint.tensors)
    shapes = shapes_for(family, checkpoint.config, config)
    method = Modegpt(config, family, family.dimensions(checkpoint.config), shapes)
    walker = TwoStreams(model, method, model.embed(tokens), lambda _: None)
    walker.solve_(0, model.block_state(0))
    return walker, model.block(1, model.block_state(1))


def originals(folder: Path, tokens: torch.Tensor, places: dict[str, str]) -> dict[str, torch.Tensor]:
    """Inputs of the stock model's modules, by our words for them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for word, name in places.items():
            model.get_submodule(name).register_forward_pre_hook(lambda _m, x, word=word: seen.update({word: x[0]}))
        model(tokens)
    return {word: tensor.reshape(*tokens.shape, -1) for word, tensor in seen.items()}


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize(("kind", "settings"), [case for case in CASES if not case[0].startswith("gemma")])
@torch.inference_mode()
def test_a_half_that_said_its_aim_would_bring_the_stream_back(
    tmp_path: Path, kind: Any, settings: dict[str, Any], half: str
) -> None:
    """The block runs on the compressed stream with the aims put into the mouths of its output linears.

    It then ends on the original stream of the stock model: whatever the residual's form and scale, and whoever shares
    the output. Through a post-norm there is no such aim; see the next test.
    """
    folder, tokens = make_tiny_model(tmp_path, kind, layers=3, **trimmed(kind, settings)), random_tokens(3, 20)
    walker, dense = at_second_block(folder, tokens)
    walker._pass_original_(dense, 1, RunningInfluence())
    halves, family = walker.halves, walker.family
    assert float((walker.compressed - walker.original).norm() / walker.original.norm()) > 0.01
    block, after = f"{family.blocks}.1", f"{family.blocks}.2.{family.norms[0]}"
    places = {"end": after, "half": f"{block}.{family.mlp_norm}"}
    seen = originals(folder, tokens, places)
    if half == "attention":
        heard = halves.without_attention_output(dense, walker.compressed, 1)
        aim, _ = walker.aim(half, slice(None), heard.rest)
        dense.get_submodule(family.attention.output).register_forward_hook(lambda *_: aim)
        if halves.parallel:
            got, wanted = walker.model.forward(dense, walker.compressed, 1), seen["end"]
        else:
            got, wanted = halves.half_way(dense, walker.compressed, 1), seen["half"]
    else:
        middle = halves.half_way(dense, walker.compressed, 1)
        heard = halves.without_mlp_output(dense, middle, 1)
        aim, _ = walker.aim(half, slice(None), heard.rest)
        speak_up(walker, dense, heard, aim)
        got, wanted = halves.finish(dense, middle, 1), seen["end"]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@torch.inference_mode()
def test_through_a_norm_the_aim_moves_what_was_said_towards_the_original_stream(
    tmp_path: Path, kind: Any, half: str
) -> None:
    """Against its definition from the stock model's own states; where the streams are one, it is what was said."""
    folder, tokens = make_tiny_model(tmp_path, kind, layers=3, **trimmed(kind, {})), random_tokens(3, 20)
    walker, dense = at_second_block(folder, tokens)
    block = f"{walker.family.blocks}.1"
    name = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[half]
    norm, gain = dense.get_submodule(name), 1 + dense.get_submodule(name).weight
    after = f"{block}.pre_feedforward_layernorm" if half == "attention" else f"{walker.family.blocks}.2.input_layernorm"
    seen = originals(folder, tokens, {"said": f"{block}.{name}", "goal": after})
    before = walker.compressed.clone()
    walker._pass_original_(dense, 1, RunningInfluence())
    rest = before if half == "attention" else walker.halves.half_way(dense, before, 1)
    aim, weights = walker.aim(half, slice(None), rest)
    length, lacking = seen["said"].square().mean(-1, keepdim=True).sqrt(), seen["goal"] - rest - norm(seen["said"])
    moved = length * lacking * gain / (gain**2 + 0.1 * (gain**2).mean())
    torch.testing.assert_close(aim, seen["said"] + moved, rtol=1e-3, atol=1e-3)
    stream = seen["goal"].square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(weights, 1 / (length * stream), rtol=1e-3, atol=1e-4)
    assert float((rest + norm(aim) - seen["goal"]).norm()) < 0.9 * float(lacking.norm())
    whole, _ = walker.aim(half, slice(None), seen["goal"] - norm(seen["said"]))
    torch.testing.assert_close(whole, seen["said"], rtol=1e-4, atol=1e-4)


def trimmed(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A case's settings for three blocks."""
    more = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}}
    kept = {name: value for name, value in settings.items() if name != "layers"}
    if "no_rope_layers" in kept:
        kept["no_rope_layers"] = [0, 1, 1]
    return {**kept, **more.get(kind, {})}


def speak_up(walker: TwoStreams, block: Any, heard: Heard, aim: torch.Tensor) -> None:
    """Let the down projections say the aim, or their experts' parts of it."""
    downs = [mlp.down for mlp in walker.family.mlps(walker.size)]
    if len(downs) == 1:
        block.get_submodule(downs[0]).register_forward_hook(lambda _m, _x, out: aim.view_as(out))
        return
    said = {e: block.get_submodule(down)(heard.inputs[down]) for e, down in enumerate(downs) if down in heard.inputs}
    for expert, target in expert_targets(heard, said, aim.flatten(0, 1)).items():
        block.get_submodule(downs[expert]).register_forward_hook(lambda *_, target=target: target)


def correlated_tokens(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens of few kinds: hidden states that lie in a small space, where there is something to correct."""
    return random_tokens(windows, length, vocabulary=24, seed=seed)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize(("kind", "settings"), FAMILIES)
def test_the_stream_is_nearer_than_in_mode_reference(
    tmp_path: Path, kind: Any, settings: dict[str, Any], sparsity: float
) -> None:
    folder = make_tiny_model(tmp_path, kind, **{"intermediate": 96, **settings})
    tokens = correlated_tokens(64, 64)
    reference = walk(folder, step(layout="full", sparsity=sparsity), tokens)
    refined, walker = refined_walk(folder, tokens, sparsity=sparsity)
    local, _ = refined_walk(folder, tokens, sparsity=sparsity, refit="local")
    with torch.inference_mode():
        hidden = reference.model.embed(tokens)
        for index, shape in enumerate(reference.method.shapes):
            state, scaling = reference.store.results[index].state, reference.method.scaling(index)
            block = reference.model.resized_block(index, state, shape.model_dump(), scaling)
            hidden = reference.model.forward(block, hidden, index)
        apart = float((hidden - walker.original).norm() / walker.original.norm())
    assert refined.reports[-1].stream_error < apart
    assert refined.reports[-1].stream_error < local.reports[-1].stream_error


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("smollm3", {"no_rope_layers": [1, 0]}), ("phi", {"kv_heads": 2}), ("gpt2", {}), ("opt", {"bias": True})],
)
def test_unrotated_query_and_key_are_corrected_then_projected_as_the_compressed_stream_asks(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    """Against a re-fit and a projection from both streams' normed states, taken from the stock code, in float64."""
    folder, tokens = make_tiny_model(tmp_path, kind, layers=2, **settings), random_tokens(8, 32)
    walker, dense = at_second_block(folder, tokens, input_ridge=0.05)
    size, names, old = walker.size, walker.family.attention, walker.model.block_state(1)
    normed = []
    with torch.inference_mode():
        for stream in (walker.original, walker.compressed):
            normed.append(run_until(walker.model, dense, stream, 1, names.query).double().reshape(-1, size.hidden))
        new = walker.solve_(1, old).solution.state
    x, y = normed
    corrected = {}
    for name in (names.query, names.key):
        W, b = old[f"{name}.weight"].double(), old.get(f"{name}.bias", torch.zeros(len(old[f"{name}.weight"]))).double()
        affine = f"{name}.bias" in old
        centre = y.mean(0) if affine else torch.zeros_like(y[0])
        target = x @ W.T + b
        middle = target.mean(0) if affine else torch.zeros_like(target[0])
        fitted, _ = refit((y - centre).T @ (y - centre) / len(y), (y - centre).T @ (target - middle) / len(y), W, 0.05)
        corrected[name] = torch.cat((fitted, (middle - fitted @ centre)[:, None]), dim=1)
    rank, width = walker.method.shapes[1].query_key_rank, size.rotary_in(1)
    rotated = size.rotary_rank(1, rank)
    assert rank < size.head_dim
    y1 = torch.cat((y, torch.ones(len(y), 1)), dim=1)
    heads = {
        name: corrected[name].reshape(size.kv_heads, -1, size.head_dim, size.hidden + 1)[:, :, width:]
        for name in corrected
    }
    for head in range(size.kv_heads):
        Q, K = heads[names.query][head], heads[names.key][head, 0]
        q, k = (y1 @ Q.mT).flatten(0, 1), y1 @ K.T
        k = k - k.mean(dim=0)
        solved = project_query_key(q.T @ q, k.T @ k, rank - rotated)
        got = {
            name: with_bias_column(new, name).reshape(size.kv_heads, -1, rank, size.hidden + 1)[head, :, rotated:]
            for name in corrected
        }
        for query in range(size.group):
            expected = Q[query].T @ solved.query @ solved.key.T @ K
            products = got[names.query][query].T @ got[names.key][0]
            torch.testing.assert_close(products, expected, rtol=2e-3, atol=2e-3)


def with_bias_column(state: dict[str, torch.Tensor], linear: str) -> torch.Tensor:
    weight = state[f"{linear}.weight"].double()
    bias = state.get(f"{linear}.bias", torch.zeros(len(weight))).double()
    return torch.cat((weight, bias[:, None]), dim=1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_saw_too_little_fall_back_by_name(tmp_path: Path, kind: Any) -> None:
    folder = make_tiny_model(tmp_path, kind, num_experts_per_tok=1, seed=1)
    starve(folder)
    done, _ = refined_walk(folder, random_tokens(8, 64), modules=["mlp"])
    size, family = done.method.size, done.model.family
    for index, report in enumerate(done.reports):
        mlp = next(module for module in report.modules if module.module == "mlp")
        assert mlp.coverage is not None
        assert (sum(mlp.coverage), mlp.coverage[2:]) == (8 * 64, (0,) * (size.experts - 2))
        assert mlp.ridge is not None
        unseen = ", ".join(map(str, range(2, size.experts)))
        assert mlp.fallback is not None
        assert mlp.fallback.startswith(
            f"experts {unseen} saw fewer calibration tokens than the {mlp.width_after} units"
        )
        new = done.store.results[index].state
        for names in family.mlps(size):
            assert new[f"{names.down}.weight"].shape == (size.hidden, mlp.width_after)


@pytest.mark.parametrize(("kind", "settings"), FAMILIES)
def test_reports_answer_for_every_refit(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    folder = make_tiny_model(tmp_path, kind, **settings)
    done, _ = refined_walk(folder, random_tokens(4 * 32, 64))  # four chunks of 2,048 tokens: one is held out
    for report in done.reports:
        for module in report.modules:
            untouched = module.module == "query_key" and done.method.size.qk_norm
            assert (module.ridge is None) == ((report.block, module.module) == (0, "query_key"))
            assert (module.fallback is not None) == untouched
            assert module.damping >= 0.0
            assert (module.coverage is not None) == (module.module == "mlp" and done.model.family.experts is not None)


@pytest.mark.parametrize(("kind", "settings"), FAMILIES)
def test_every_family_has_metrics_and_prices(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    """The streamed backward pass against autograd through the stock model; prices start at nothing and rise."""
    folder = make_tiny_model(tmp_path, kind, **{"intermediate": 96, **settings})
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    size, costs = family.dimensions(checkpoint.config), block_costs(family, checkpoint.config)
    streamed, tokens = StreamedModel(folder, family), random_tokens(2, 40)
    config = step(mode="refined", layout="full", round_to=8, sparsity=0.3)
    method = Modegpt(config, family, size, shapes_for(family, checkpoint.config, config))
    names = modules_of(family, checkpoint.config, config)
    found, lists = {}, {}

    def visit(index: int, block: Any, inputs: Any, statistics: Any, metrics: Metrics) -> None:
        found[index] = metrics
        lists[index] = price_block(streamed, method, costs, names, index, block, inputs, statistics, metrics)

    walk_backward(streamed, size, tokens, visit)
    for (index, name), gradient in stock_gradients(folder, family, tokens).items():
        expected = gradient.T @ gradient / tokens.numel()
        scale = float(expected.diagonal().mean())
        torch.testing.assert_close(getattr(found[index], name), expected, rtol=1e-3, atol=1e-3 * scale)
    for of_block in lists.values():
        assert set(of_block) == set(names)
        for one in of_block.values():
            assert one.prices[0] == one.saved[0] == 0
            assert list(one.prices) == sorted(one.prices)
            assert one.prices[-1] > 0


def test_the_price_of_values_is_half_the_energy_beyond_the_rank(tmp_path: Path) -> None:
    """½ Σ over heads of the squared singular values that go, of √G [Oᵀ√F …], by plain roots and a plain SVD."""
    folder = make_tiny_model(tmp_path, "llama", kv_heads=2)
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    size, costs = family.dimensions(checkpoint.config), block_costs(family, checkpoint.config)
    streamed, config = StreamedModel(folder, family), step(mode="refined", layout="full", sparsity=0.3)
    method = Modegpt(config, family, size, shapes_for(family, checkpoint.config, config))

    def root(matrix: torch.Tensor) -> torch.Tensor:
        energy, basis = torch.linalg.eigh(matrix)
        return basis @ torch.diag(energy.clamp_min(0).sqrt()) @ basis.T

    def visit(index: int, block: Any, inputs: Any, statistics: Any, metrics: Metrics) -> None:
        names = ("value_output",)
        prices = price_block(streamed, method, costs, names, index, block, inputs, statistics, metrics)["value_output"]
        F, W = root(metrics.attention), streamed.block_state(index)[f"{family.attention.output}.weight"].double()
        for rank, price in zip(prices.widths, prices.prices, strict=True):
            lost = 0.0
            for head, G in enumerate(statistics.mixed_by_group()):
                own = range(head * size.group, (head + 1) * size.group)
                slices = [W[:, one * size.head_dim : (one + 1) * size.head_dim] for one in own]
                seen = root(G) @ torch.cat([one.T @ F for one in slices], dim=1)
                lost += float(torch.linalg.svdvals(seen)[rank:].square().sum()) / 2
            assert price == pytest.approx(lost, rel=1e-6, abs=1e-12)

    walk_backward(streamed, size, random_tokens(2, 40), visit)


def stock_gradients(folder: Path, family: Any, tokens: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Of the summed loss, at the outputs of both halves' last modules of each block, `[tokens, hidden]` in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    for index, block in enumerate(model.get_submodule(family.blocks)):
        for name, module in (("attention", family.attention.output), ("mlp", family.mlp_output)):
            key = (index, name)
            block.get_submodule(module).register_forward_hook(lambda _m, _i, out, key=key: outputs.update({key: out}))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {key: one.double().flatten(0, -2) for key, one in zip(outputs, gradients, strict=True)}


def test_routing_is_the_mean_square_of_the_routers_weights(tmp_path: Path) -> None:
    folder, tokens = make_tiny_model(tmp_path, "mixtral"), random_tokens(3, 20)
    family = resolve(open_checkpoint(folder).config)
    streamed, found = StreamedModel(folder, family), {}
    walk_backward(streamed, streamed.size, tokens, lambda index, _b, _i, _s, metrics: found.update({index: metrics}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    told: list[torch.Tensor] = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _m, inputs: told.extend(inputs[1:]))
    with torch.inference_mode():
        model(tokens)
    by_expert = torch.zeros(60, 3).scatter(1, told[0], told[1])
    torch.testing.assert_close(torch.tensor(found[1].routing), by_expert.square().mean(0), rtol=1e-4, atol=1e-5)


def solved_with_whole_mlps(folder: Path, tokens: torch.Tensor, **settings: Any) -> tuple[TwoStreams, Any, Any, Any]:
    """Block 1 solved with narrower attention only: walker, original block, its new tensors, y where its MLP reads."""
    walker, dense = at_second_block(folder, tokens, modules=["value_output"], sparsity=0.05, **settings)
    before, old = walker.compressed.clone(), walker.model.block_state(1)
    new = walker.solve_(1, old).solution.state
    assert walker.method.shapes[1].mlp_width == walker.size.mlp_width
    return walker, dense, new, walker.halves.half_way(walker.narrow(1, new), before, 1)


@pytest.mark.parametrize(("kind", "settings"), FAMILIES)
@torch.inference_mode()
def test_what_reads_the_mlps_input_says_of_one_stream_what_it_said_of_the_other(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    """Gate, up and routers against a re-fit from both streams' normed states, in float64."""
    folder, tokens = make_tiny_model(tmp_path, kind, **settings), random_tokens(8, 32)
    walker, dense, new, middle = solved_with_whole_mlps(folder, tokens, input_ridge=0.05)
    old, family = walker.model.block_state(1), walker.family
    x, y = (
        walker.halves.mlp_inputs(dense, stream, 1).double().reshape(-1, walker.size.hidden)
        for stream in (walker.middle, middle)
    )
    linears = [linear for mlp in family.mlps(walker.size) for linear in mlp.inputs]
    for linear in [*linears, *([family.experts.router] if family.experts else [])]:
        W, affine = old[f"{linear}.weight"].double(), f"{linear}.bias" in old
        b = old[f"{linear}.bias"].double() if affine else torch.zeros_like(W[:, 0])
        centre = y.mean(0) if affine else torch.zeros_like(y[0])
        target = x @ W.T + b
        shift = target.mean(0) if affine else torch.zeros_like(b)
        fitted, _ = refit((y - centre).T @ (y - centre) / len(y), (y - centre).T @ (target - shift) / len(y), W, 0.05)
        torch.testing.assert_close(new[f"{linear}.weight"].double(), fitted, rtol=1e-3, atol=1e-4)
        if affine:
            torch.testing.assert_close(new[f"{linear}.bias"].double(), shift - fitted @ centre, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@torch.inference_mode()
def test_each_expert_is_refitted_to_its_share_on_the_tokens_it_sees(tmp_path: Path, kind: Any) -> None:
    """Against a solve from the router's own decisions, by the definition of the aim, in float64."""
    folder, tokens = make_tiny_model(tmp_path, kind, norm_topk_prob=False), random_tokens(8, 32)
    walker, _, new, middle = solved_with_whole_mlps(folder, tokens, output_ridge=0.05)
    old, family, size = walker.model.block_state(1), walker.family, walker.size
    downs = {f"{mlp.down}.weight" for mlp in family.mlps(size)}
    block = walker.narrow(1, {name: old[name] if name in downs else tensor for name, tensor in new.items()})
    told: list[torch.Tensor] = []
    block.get_submodule(family.experts.module).register_forward_pre_hook(lambda _m, inputs: told.extend(inputs))
    now = walker.halves.finish(block, middle, 1)
    states, chosen, weights = told
    goal = model_stream(folder, tokens, 2)
    lacking = (goal - now).double().reshape(-1, size.hidden)
    length = goal.double().reshape(-1, size.hidden).square().mean(1, keepdim=True).sqrt()
    for expert, names in enumerate(family.mlps(size)):
        mine = (chosen == expert).any(dim=1)
        w = (weights * (chosen == expert)).sum(1, keepdim=True)[mine].double()
        gate, up = (states[mine] @ new[f"{name}.weight"].T for name in names.inputs)
        units = (torch.nn.functional.silu(gate) * up).double()
        D = old[f"{names.down}.weight"].double()
        target = units @ D.T + w / weights[mine].double().square().sum(1, keepdim=True) * lacking[mine]
        rows = w / length[mine]
        gram, cross = (units * rows).T @ (units * rows), (units * rows).T @ (target * rows)
        mass = float(rows.square().sum())
        fitted, _ = refit(gram / mass, cross / mass, D, 0.05)
        torch.testing.assert_close(new[f"{names.down}.weight"].double(), fitted, rtol=1e-3, atol=1e-4)


def model_stream(folder: Path, tokens: torch.Tensor, blocks: int) -> torch.Tensor:
    """The stock model's hidden states after so many of its blocks, of which there are no more."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(tokens)
    assert model.config.num_hidden_layers == blocks
    return seen[0]


def test_the_price_of_experts_is_the_sum_of_what_each_costs_at_its_routing(tmp_path: Path) -> None:
    """At the least width by hand: ½ E[w²] times the residual of removing the same units, added up over experts."""
    folder, tokens = make_tiny_model(tmp_path, "mixtral", intermediate=96, num_local_experts=4), random_tokens(4, 40)
    starve(folder)  # of four experts the first two win most tokens
    checkpoint = open_checkpoint(folder)
    family = resolve(checkpoint.config)
    size, costs = family.dimensions(checkpoint.config), block_costs(family, checkpoint.config)
    streamed = StreamedModel(folder, family)
    config = step(mode="refined", layout="full", round_to=8, sparsity=0.3)
    method = Modegpt(config, family, size, shapes_for(family, checkpoint.config, config))
    seen: dict[int, Any] = {}

    def visit(index: int, block: Any, inputs: Any, statistics: Any, metrics: Metrics) -> None:
        price = price_block(streamed, method, costs, ("mlp",), index, block, inputs, statistics, metrics)["mlp"]
        seen[index] = (price, statistics, metrics)

    walk_backward(streamed, size, tokens, visit)
    price, statistics, metrics = seen[1]
    at = price.widths.index(48)
    expected = 0.0
    for names, gram, routing in zip(family.mlps(size), statistics.experts, metrics.routing, strict=True):
        C, D = gram.mean()[0], streamed.block_state(1)[f"{names.down}.weight"].double()
        kept = removal_order(C, D, metrics.mlp, 8).keep(48)
        floor = FLOOR * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        C = C + floor
        rest = C - C[:, kept] @ torch.linalg.solve(C[kept][:, kept], C[kept])
        expected += routing * float(torch.sum(metrics.mlp * (D @ rest @ D.T))) / 2
    assert price.prices[at] == pytest.approx(expected, rel=1e-4)
    assert len(set(metrics.routing)) == 4
