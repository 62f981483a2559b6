"""A block that was computed wrongly once is found, solved again, and comes out as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from api_schemas.errors import JobFailed
from api_schemas.plans import BlockShape
from api_schemas.reports import BlockReport
from compression.core.blockwise import OneStream, compress_blocks
from compression.core.protocols import Step, Walker
from compression.core.streamed_model import StreamedModel
from compression.methods.modegpt import Modegpt
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve
from tests.compression.walks import MemoryBlockStore, random_tokens, step
from tests.tiny_models import make_tiny_model

BLOCKS, STRUCK = 5, 3
Strike = Callable[["Bench", OneStream, Step | None], None]


class Bench:
    """A tiny model and walkers over it, one of whose solves of block `STRUCK` goes wrong."""

    def __init__(
        self, folder: Path, strike: Strike | None = None, *, times: int = 1, narrow: int | None = None
    ) -> None:
        checkpoint = open_checkpoint(folder)
        family = resolve(checkpoint.config)
        self.size = family.dimensions(checkpoint.config)
        self.model = StreamedModel(folder, family, checkpoint.tensors)
        shapes = [BlockShape(mlp_width=47, query_key_rank=8, value_output_rank=8) for _ in range(BLOCKS)]
        if narrow is not None:
            shapes[STRUCK] = shapes[STRUCK].model_copy(update={"mlp_width": narrow})
        self.method = Modegpt(step(modules=["mlp"], layout="full"), family, self.size, shapes)
        self.store = MemoryBlockStore()
        self.strike, self.left, self.solved = strike, times, 0

    def walker(self) -> Walker:
        bench = self

        class Struck(OneStream):
            def solve_(self, index: int, state: dict[str, Tensor]) -> Step:
                bench.solved += index == STRUCK
                hit = bench.strike if index == STRUCK and bench.left > 0 else None
                bench.left -= hit is not None
                if hit is not None:
                    hit(bench, self, None)
                solved = super().solve_(index, state)
                if hit is not None:
                    hit(bench, self, solved)
                return solved

        hidden = self.model.embed(random_tokens(8, 32))
        return Struck(self.model, self.method, self.size, hidden, propagation="sequential")

    def run(self, *, again: bool = True) -> list[BlockReport]:
        return list(compress_blocks(self.model, self.walker(), self.store, again=self.walker if again else None))

    def states(self) -> list[dict[str, Tensor]]:
        found = [self.store.get(index) for index in range(BLOCKS)]
        return [result.state for result in found if result is not None]


def nan_in_the_stream(_bench: Bench, walker: OneStream, solved: Step | None) -> None:
    """One activation is NaN before the block is observed."""
    if solved is None:
        walker.hidden[5, 7, 2] = torch.nan


def nan_in_a_weight(_bench: Bench, _walker: OneStream, solved: Step | None) -> None:
    """One weight of the result is NaN."""
    if solved is not None:
        next(iter(solved.solution.state.values())).view(-1)[3] = torch.nan


def huge_error(_bench: Bench, _walker: OneStream, solved: Step | None) -> None:
    """The result is of another block's making: finite, and far off."""
    if solved is not None:
        for tensor in solved.solution.state.values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
        object.__setattr__(solved, "relative_output_error", 1000 * solved.relative_output_error + 10)


def another_each_time(bench: Bench, walker: OneStream, solved: Step | None) -> None:
    """Never the same twice."""
    huge_error(bench, walker, solved)
    if solved is not None:
        next(iter(solved.solution.state.values())).view(-1)[0] = float(bench.left)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model", layers=BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Bench:
    bench = Bench(folder)
    reports = bench.run()
    assert [report.rerun for report in reports] == [None] * BLOCKS
    assert bench.solved == 1  # nothing was solved twice
    return bench


def assert_same(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> None:
    assert len(one) == len(two) == BLOCKS
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("strike", "reason"),
    [(nan_in_the_stream, "its solve failed"), (nan_in_a_weight, "weights are not finite"), (huge_error, "neighbours")],
)
def test_what_went_wrong_once_is_found_and_made_good(
    folder: Path, undisturbed: Bench, strike: Strike, reason: str
) -> None:
    bench = Bench(folder, strike)
    reports = bench.run()
    rerun = reports[STRUCK].rerun
    assert rerun is not None
    assert (rerun.verdict, reason in rerun.reason) == ("transient", True), rerun
    assert len(rerun.errors) == bench.solved == 3
    assert [report.rerun for report in reports if report.block != STRUCK] == [None] * (BLOCKS - 1)
    assert_same(bench.states(), undisturbed.states())


def test_the_first_run_counts_when_the_second_was_struck(folder: Path, undisturbed: Bench) -> None:
    def second_only(bench: Bench, _walker: OneStream, solved: Step | None) -> None:
        if solved is not None and bench.solved == 1:  # looks wrong, and is right
            object.__setattr__(solved, "relative_output_error", 100.0)
        elif solved is not None:
            next(iter(solved.solution.state.values())).view(-1)[0] += 1.0

    bench = Bench(folder, second_only, times=2)
    assert bench.run()[STRUCK].rerun is not None
    assert_same(bench.states(), undisturbed.states())


def test_what_is_the_datas_own_is_left_as_it_is(folder: Path) -> None:
    bench = Bench(folder, narrow=1)  # of 48 channels one is left, in this block alone
    rerun = bench.run()[STRUCK].rerun
    assert rerun is not None
    assert (rerun.verdict, len(rerun.errors), bench.solved) == ("correct", 2, 2)
    assert rerun.errors[0] == rerun.errors[1]
    plain = Bench(folder, narrow=1)
    assert plain.run(again=False)[STRUCK].rerun is None
    assert_same(bench.states(), plain.states())


def test_what_never_comes_out_the_same_ends_the_job(folder: Path) -> None:
    bench = Bench(folder, another_each_time, times=3)
    with pytest.raises(JobFailed, match="differently in each of 3 runs") as raised:
        bench.run()
    assert raised.value.code == "block_not_reproducible"
    assert bench.store.get(STRUCK) is None


def test_nan_that_is_the_datas_own_is_named(folder: Path) -> None:
    bench = Bench(folder, nan_in_the_stream, times=2)
    with pytest.raises(JobFailed) as raised:
        bench.run()
    assert (raised.value.code, bench.solved) == ("not_finite", 2)
    alone = Bench(folder, nan_in_the_stream)
    with pytest.raises(JobFailed) as raised:
        alone.run(again=False)
    assert (raised.value.code, alone.solved) == ("not_finite", 1)
