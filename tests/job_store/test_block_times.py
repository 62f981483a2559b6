"""The stated rule for slow blocks and stragglers."""

import pytest
from sqlalchemy import Engine, func, select

from job_store.block_times import WINDOW, BlockTimes, is_slow
from job_store.database import reading
from job_store.tables import BlockTimeRow
from job_store.workers import WorkerStore


@pytest.mark.parametrize(
    ("before", "seconds", "slow"),
    [
        ([10.0] * 4, 99.0, False),  # too few
        ([10.0] * 5, 10.9, False),  # within 10 % of the median
        ([10.0] * 5, 11.1, True),
        ([6.0, 8.0, 10.0, 12.0, 14.0], 11.9, False),  # the deviation, 2, is more than 10 %
        ([6.0, 8.0, 10.0, 12.0, 14.0], 12.1, True),
        ([10.0] * 5, 1.0, False),  # fast is no fault
    ],
)
def test_the_larger_of_deviation_and_a_tenth(before: list[float], seconds: float, slow: bool) -> None:
    assert is_slow(seconds, before) is slow


def judge(times: BlockTimes, worker: str | None, seconds: float, kind: str = "k") -> tuple[bool, bool]:
    judged = times.judge(kind, seconds, job_id="job-1", block=0, worker_id=worker)
    return judged.slow, judged.straggler


def test_three_in_a_row_make_a_straggler(engine: Engine) -> None:
    times, workers = BlockTimes(engine), WorkerStore(engine)
    good, bad = (workers.add(name, "class", "ready", [], 0.0) for name in ("good", "bad"))
    for _ in range(7):
        assert judge(times, good, 10.0) == (False, False)
    assert [judge(times, bad, 15.0) for _ in range(2)] == [(True, False)] * 2
    assert judge(times, bad, 10.0) == (False, False)  # the row is broken
    assert [judge(times, bad, 15.0) for _ in range(4)] == [(True, False), (True, False), (True, True), (True, False)]
    slow = {worker.name: worker.slow_blocks for worker in workers.list()}
    assert slow == {"good": 0, "bad": 4}


def test_what_slows_all_down_makes_no_straggler(engine: Engine) -> None:
    times, workers = BlockTimes(engine), WorkerStore(engine)
    one, two = (workers.add(name, "class", "ready", [], 0.0) for name in ("one", "two"))
    for _ in range(20):
        judge(times, one, 10.0)
    for _ in range(2):
        judge(times, one, 15.0)
    assert judge(times, one, 15.0) == (True, True)  # nobody else was slow by then
    assert [judge(times, two, 15.0) for _ in range(3)] == [(True, False)] * 3


def test_kinds_and_classes_are_apart_and_the_past_is_forgotten(engine: Engine) -> None:
    times, workers = BlockTimes(engine), WorkerStore(engine)
    fast, slow = (workers.add(name, name, "ready", [], 0.0) for name in ("fast class", "slow class"))
    for _ in range(WINDOW + 20):
        judge(times, fast, 1.0)
    assert judge(times, slow, 100.0) == (False, False)
    assert judge(times, None, 100.0) == (False, False)
    assert judge(times, fast, 100.0, kind="another") == (False, False)
    assert judge(times, fast, 100.0) == (True, False)
    with reading(engine) as session:
        kept = session.scalar(
            select(func.count()).where(BlockTimeRow.worker_class == "fast class", BlockTimeRow.kind == "k")
        )
    assert kept == WINDOW
