"""What is in memory: loaded once, least recently used out first, never while in use."""

import asyncio
import threading

import pytest
import torch

from api_schemas.errors import InvalidRequest, ModepressError
from tests.tiny_models import make_tiny_model
from workers.inference import models as models_module
from workers.inference.loading import load, measured_bytes, plan_load
from workers.inference.models import ModelCache
from workers.inference.registry import ModelSource


@pytest.fixture
def sources(tiny_folders):
    return {name: ModelSource(name, folder, 1.0) for name, folder in tiny_folders.items()}


@pytest.fixture
def one_size(tiny_loaded):
    return tiny_loaded["llama"].bytes


def names(cache):
    return [slot.source.id for slot in cache.slots]


def ticking():
    """A clock that moves by one second each time it is read."""
    seconds = iter(range(1, 10_000))
    return lambda: float(next(seconds))


async def use(cache, source):
    async with cache.lease(source) as loaded:
        return loaded


def test_bytes_are_measured_and_ties_count_once(tmp_path, tiny_loaded):
    tied = load(plan_load(ModelSource("tied", make_tiny_model(tmp_path / "tied", tied=True), 1.0)))
    untied = tiny_loaded["llama"]
    assert untied.bytes - tied.bytes == 384 * 32 * 4
    assert measured_bytes(torch.nn.Linear(3, 5)) == 4 * (15 + 5)


def test_planned_bytes_are_those_of_the_weights(tiny_folders, tiny_loaded):
    plan = plan_load(ModelSource("llama", tiny_folders["llama"], 1.0))
    buffers = sum(buffer.untyped_storage().nbytes() for buffer in tiny_loaded["llama"].model.buffers())
    assert tiny_loaded["llama"].bytes - buffers <= plan.bytes <= tiny_loaded["llama"].bytes


def test_the_least_recently_used_makes_room(sources, one_size):
    async def scenario():
        cache = ModelCache(int(one_size * 2.5), ticking())
        for name in ("llama", "bare", "llama"):
            await use(cache, sources[name])
        await use(cache, sources["endless"])
        assert names(cache) == ["llama", "endless"]
        assert cache.used_bytes <= cache.limit_bytes

    asyncio.run(scenario())


def test_a_model_in_memory_is_not_loaded_again(sources):
    async def scenario():
        cache = ModelCache(10**9)
        assert await use(cache, sources["llama"]) is await use(cache, sources["llama"])

    asyncio.run(scenario())


def test_many_requests_at_once_load_a_model_once(sources, monkeypatch):
    calls = []

    def counted(plan):
        calls.append(plan.source.id)
        return load(plan)

    monkeypatch.setattr(models_module, "load", counted)

    async def scenario():
        cache = ModelCache(10**9)
        found = await asyncio.gather(*(use(cache, sources["llama"]) for _ in range(8)))
        assert all(loaded is found[0] for loaded in found)

    asyncio.run(scenario())
    assert calls == ["llama"]


def test_a_model_in_use_stays_and_the_next_waits_for_its_end(sources, one_size):
    async def scenario():
        cache = ModelCache(int(one_size * 1.5))
        async with cache.lease(sources["llama"]):
            second = asyncio.create_task(use(cache, sources["bare"]))
            await asyncio.wait({second}, timeout=0.3)
            assert not second.done()
            assert names(cache) == ["llama"]
        await second
        assert names(cache) == ["bare"]

    asyncio.run(scenario())


def test_the_loop_runs_on_while_a_model_loads(sources, monkeypatch):
    loading, go_on = threading.Event(), threading.Event()

    def slow(plan):
        loading.set()
        assert go_on.wait(60)
        return load(plan)

    monkeypatch.setattr(models_module, "load", slow)

    async def scenario():
        cache = ModelCache(10**9)
        task = asyncio.create_task(use(cache, sources["llama"]))
        while not loading.is_set():
            await asyncio.sleep(0.01)
        assert cache.slots[0].loaded is None  # this very coroutine is what must not be blocked
        assert not cache.slots[0].idle
        go_on.set()
        await task

    asyncio.run(scenario())


def test_who_gives_up_while_loading_does_not_end_the_load_for_others(sources):
    async def scenario():
        cache = ModelCache(10**9)
        first = asyncio.create_task(use(cache, sources["llama"]))
        second = asyncio.create_task(use(cache, sources["llama"]))
        while not cache.slots:
            await asyncio.sleep(0.005)
        first.cancel()
        assert (await second).source.id == "llama"
        assert cache.slots[0].users == 0

    asyncio.run(scenario())


def test_a_model_larger_than_the_limit_is_refused_by_name_before_it_is_loaded(sources, one_size):
    async def scenario():
        cache = ModelCache(one_size // 2)
        with pytest.raises(InvalidRequest) as caught:
            await use(cache, sources["llama"])
        assert (caught.value.code, caught.value.param) == ("model_too_large", "model")
        assert "'llama'" in caught.value.message
        assert "MODEPRESS_INFERENCE_MEMORY_BYTES" in caught.value.message
        assert names(cache) == []

    asyncio.run(scenario())


def test_a_refused_model_unloads_nobody(sources, tmp_path, one_size):
    large = ModelSource("large", make_tiny_model(tmp_path / "large", hidden=128, heads=16, intermediate=512), 1.0)

    async def scenario():
        cache = ModelCache(int(one_size * 1.5))
        await use(cache, sources["llama"])
        with pytest.raises(InvalidRequest):
            await use(cache, large)
        assert names(cache) == ["llama"]

    asyncio.run(scenario())


def test_a_failed_load_is_tried_again_by_the_next_request(copy_of):
    folder = copy_of("llama")
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    source = ModelSource("mended", folder, 1.0)

    async def scenario():
        cache = ModelCache(10**9)
        with pytest.raises(ModepressError):
            await use(cache, source)
        assert names(cache) == []
        (folder / "tokenizer.json").write_bytes(tokenizer)
        await use(cache, source)
        assert names(cache) == ["mended"]

    asyncio.run(scenario())


def test_a_model_registered_anew_under_the_same_id_is_loaded_anew(sources):
    async def scenario():
        cache = ModelCache(10**9)
        old = await use(cache, sources["llama"])
        new = await use(cache, ModelSource("llama", sources["llama"].folder, 2.0))
        assert new is not old
        assert names(cache) == ["llama"]

    asyncio.run(scenario())


def test_a_forgotten_model_is_unloaded_unless_in_use(sources):
    async def scenario():
        cache = ModelCache(10**9)
        async with cache.lease(sources["llama"]):
            cache.forget("llama")
            assert names(cache) == ["llama"]
        cache.forget("llama")
        cache.forget("unknown")
        assert names(cache) == []

    asyncio.run(scenario())
