"""A worker that fails its own check takes no work and says why; one whose arithmetic is wrong fails it."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from api_schemas.workers import SelfCheck
from job_store.queue import depth, enqueue
from job_store.settings import Settings
from job_store.workers import ALIVE_SECONDS, FEWEST, WorkerStore
from tests.servers import celery_worker, wait_until
from tests.workers.live import add_model, environment
from workers import self_check, self_check_process
from workers.self_check import Presence, check_worker
from workers.workplace import Workplace, open_workplace

CPU = torch.device("cpu")


def results(checks: list[SelfCheck]) -> dict[str, str]:
    return {check.name: check.result for check in checks}


def test_this_machine_passes(place: Workplace) -> None:
    worker_id, standing = check_worker(
        place.__class__(
            place.settings.model_copy(update={"self_check": "required"}), place.engine, place.layout, place.leases
        ),
        "celery@here",
    )
    (worker,) = WorkerStore(place.engine).list()
    assert (worker.id, worker.name, worker.standing, standing) == (worker_id, "celery@here", "ready", "ready")
    found = {check.name: check for check in worker.checks}
    assert {check.name for check in worker.checks if check.result == "fail"} == set()
    assert {"disk", "memory", "determinism", "product float32", "product float64", "product bfloat16", "versions",
            "database clock", "broker", "singular values of a known matrix"} <= set(found)  # fmt: skip
    for rate in ("disk", "memory", "product float32"):
        assert (found[rate].value or 0) > 1e6
    assert abs(found["database clock"].value or 9) < 1
    assert "torch" in found["versions"].detail
    assert worker.worker_class.endswith("1 threads")
    assert list(place.layout.home.glob("self-check*")) == []


ALL = {"product against float64", "Cholesky factor of a known matrix", "singular values of a known matrix"}


def flipped(a: Tensor, b: Tensor) -> Tensor:
    """One entry is off by what a flipped bit of the mantissa makes."""
    product = a @ b
    for place in ((3, 5), (5, 3)):
        product[place] += 2.0**-6
    return product


class Sometimes:
    """Right but for the seventh time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.times += 1
        product = a @ b
        if self.times == 7:
            product[0, 0] = product[0, 0].nextafter(torch.tensor(torch.inf, dtype=product.dtype))
        return product


@pytest.mark.parametrize(
    ("multiply", "failing"),
    [
        (torch.matmul, set()),
        (flipped, ALL),
        (lambda a, b: b @ a, {"product against float64", "Cholesky factor of a known matrix"}),
        (lambda a, b: (a.bfloat16() @ b.bfloat16()).to(a.dtype),
         ALL),
        (lambda a, b: a @ b * float("nan"), {"product against float64"}),
        (Sometimes(), {"determinism"}),
    ],
)  # fmt: skip
def test_wrong_arithmetic_fails(multiply: Callable[[Tensor, Tensor], Tensor], failing: set[str]) -> None:
    try:
        found = results(self_check_process.numerics(CPU, multiply))
    except torch.linalg.LinAlgError:  # NaN has no factor: the process ends, and that is a failure too
        assert bool(torch.isnan(multiply(torch.ones(1, 1), torch.ones(1, 1))).all())
        return
    failed = {name for name, result in found.items() if result == "fail"}
    assert failing <= failed
    assert bool(failed) == bool(failing)


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (check,) = self_check_process.disk(tmp_path)
    assert check.result == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        self_check_process.disk(tmp_path / "file" / "folder")


def required(place: Workplace) -> Workplace:
    settings = place.settings.model_copy(update={"self_check": "required"})
    return Workplace(settings, place.engine, place.layout, place.leases)


def says(tmp_path: Path, body: str) -> tuple[str, str]:
    path = tmp_path / "check.py"
    path.write_text(f"import json, os, sys, time\n{body}")
    return sys.executable, str(path)


def rate(value: float, worker_class: str = "GPU of a kind", **more: object) -> str:
    check = {"name": "product bfloat16", "result": "ok", "detail": "d", "value": value, "unit": "FLOP/s", **more}
    return f"print(json.dumps({ {'worker_class': worker_class, 'checks': [check]}!r}))"


def test_a_slow_device_is_compared_with_its_class(place: Workplace, tmp_path: Path) -> None:
    place, store = required(place), WorkerStore(place.engine)
    for value in (90.0, 100.0, 100.0, 110.0, 100.0):
        assert store.median("GPU of a kind", "product bfloat16") is None  # until there are five
        assert check_worker(place, "w", command=says(tmp_path, rate(value)))[1] == "ready"
    assert store.median("GPU of a kind", "product bfloat16") == 100.0
    for value, standing, result in ((91.0, "ready", "ok"), (89.0, "ready", "warn"), (69.0, "failed", "fail")):
        assert check_worker(place, "w", command=says(tmp_path, rate(value)))[1] == standing
        (check,) = [one for one in store.list()[0].checks if one.name == "product bfloat16"]
        assert (check.result, "of the median" in check.detail) == (result, True)
    for _ in range(FEWEST):
        check_worker(place, "w", command=says(tmp_path, rate(100.0, "EPYC, 2 threads")))
    assert check_worker(place, "w", command=says(tmp_path, rate(10.0, "EPYC, 2 threads")))[1] == "ready"
    assert results(list(store.list()[0].checks))["product bfloat16"] == "warn"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit('no such device')", "no such device"),
        ("time.sleep(60)", "did not end within"),
        ("os.abort()", "status -6"),
    ],
)
def test_a_check_that_does_not_end_well_fails(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    monkeypatch.setattr(self_check, "LIMIT_SECONDS", 3.0)
    assert check_worker(required(place), "w", command=says(tmp_path, body))[1] == "failed"
    failed = [check for check in WorkerStore(place.engine).list()[0].checks if check.result == "fail"]
    assert [words in check.detail for check in failed] == [True]


def test_what_is_switched_off_is_seen(place: Workplace) -> None:
    skipping = Workplace(
        place.settings.model_copy(update={"self_check": "skip"}), place.engine, place.layout, place.leases
    )
    assert check_worker(skipping, "w")[1] == "unchecked"
    (worker,) = WorkerStore(place.engine).list()
    assert (worker.standing, worker.alive) == ("unchecked", True)
    assert "MODEPRESS_SELF_CHECK" in worker.checks[0].detail


def test_a_worker_is_alive_while_it_says_so(place: Workplace) -> None:
    now = [1000.0]
    store = WorkerStore(place.engine, clock=lambda: now[0])
    worker_id = store.add("w", "c", "ready", [], 0.0)
    assert store.list()[0].alive
    now[0] += ALIVE_SECONDS + 1
    assert not store.list()[0].alive
    store.seen(worker_id)
    assert store.list()[0].alive
    Presence(place, worker_id).stop()
    assert not store.list()[0].alive


@pytest.mark.servers
def test_a_failing_worker_stays_out_of_the_queue(tmp_path: Path, redis_url: str) -> None:
    # the database's clock cannot be moved; a lease so short that any skew is too much stands for a wrong clock
    settings = Settings(
        home=tmp_path / "home", broker_url=redis_url, lease_seconds=1e-9, self_check="required", threads=1
    )
    place = open_workplace(settings)
    try:
        add_model(place, "tiny", tmp_path)
        with celery_worker(environment(settings), tmp_path / "worker.log"):
            (worker,) = WorkerStore(place.engine).list()
            assert (worker.standing, worker.alive) == ("failed", True)
            assert results(list(worker.checks))["database clock"] == "fail"
            before = depth("compress", broker_url=redis_url)
            enqueue("job-nobody-has", "compress", broker_url=redis_url)
            time.sleep(3)
            assert depth("compress", broker_url=redis_url) == before + 1
        assert b"this worker takes no work" in (tmp_path / "worker.log").read_bytes()
        sound = settings.model_copy(update={"lease_seconds": 90.0})
        with celery_worker(environment(sound) | {"MODEPRESS_LEASE_SECONDS": "90"}, tmp_path / "second.log"):
            wait_until(lambda: depth("compress", broker_url=redis_url) == 0, what="an empty queue")
            assert WorkerStore(place.engine).list()[0].standing == "ready"
    finally:
        place.engine.dispose()
