"""A job's time line keeps the rules of Chrome's trace events, and its times add up; also over a killed attempt."""

import json
import signal
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from api_schemas.errors import NotFound
from api_schemas.jobs import Job, JobRequest
from api_schemas.reports import CompressionReport
from job_store.jobs import JobStore
from job_store.trace_files import WATCH_THREAD, WORK_THREAD, TraceFile
from job_store.traces import chrome_trace, job_time, own_seconds, read_events
from modepress.report_table import report_table
from tests.servers import wait_until
from tests.tiny_models import make_tiny_model
from tests.workers.live import BLOCKS, RECIPE, add_model
from workers.supervisor import Supervisor
from workers.workplace import Workplace

Event = dict[str, Any]


def assert_trace_events(document: dict[str, Any]) -> None:
    """What the format asks for, by phase; slices of one thread nest, times do not go back."""
    assert document["displayTimeUnit"] in ("ms", "ns")
    events = document["traceEvents"]
    last = 0.0
    threads = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] in ("X", "C", "i", "M")  # no B, so none lacks its E
        if event["ph"] == "M":
            assert event["args"]["name"]
            continue
        assert event["ts"] >= last
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append(event)
        if event["ph"] == "C":
            assert all(isinstance(value, float | int) for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    for slices in threads.values():
        assert_nested(slices)
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    assert {event["pid"] for event in events} == named


def assert_nested(slices: list[Event], rounding: float = 2.0) -> None:
    open_until: list[float] = []
    for one in slices:  # in order of time, outer ones first
        while open_until and open_until[-1] <= one["ts"] + rounding:
            open_until.pop()
        assert not open_until or one["ts"] + one["dur"] <= open_until[-1] + rounding, one
        open_until.append(one["ts"] + one["dur"])


@pytest.fixture
def killed_once(place: Workplace, jobs: JobStore, tmp_path: Path) -> Job:
    """A real job whose first process was killed after a block, and whose second ended well."""
    add_model(place, "tiny", make_tiny_model(tmp_path / "tiny", layers=BLOCKS, hidden=64, intermediate=128))
    job = jobs.create(JobRequest.model_validate({"model": "tiny", "recipe": RECIPE}), recipe_hash="0" * 64)[0]
    with pytest.raises(NotFound, match="no time line"):
        chrome_trace(place.layout, job.id)
    first = threading.Thread(target=Supervisor(place).run, args=(job.id,), daemon=True)
    first.start()
    wait_until(lambda: list(place.layout.blocks(job.id).glob("*/block-*.json")), seconds=120, what="a block")
    (process,) = [child for child in psutil.Process().children() if "workers.job_process" in child.cmdline()]
    process.send_signal(signal.SIGKILL)
    first.join(60)
    assert_trace_events(chrome_trace(place.layout, job.id))
    Supervisor(place).run(job.id)
    ended = jobs.get(job.id)
    assert ended.status == "succeeded", ended.error
    return ended


def test_the_time_line_of_a_job_that_was_killed_once(place: Workplace, jobs: JobStore, killed_once: Job) -> None:
    document = chrome_trace(place.layout, killed_once.id)
    assert_trace_events(document)
    events = document["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}  # one process per attempt
    (fault,) = [event for event in events if event["ph"] == "i"]
    assert (fault["pid"], fault["name"], fault["args"]["returncode"]) == (1, "ended: fault", -9)
    supervised = [event for event in events if event["name"] == "supervised"]
    assert len(supervised) == 2
    assert supervised[0]["ts"] + supervised[0]["dur"] <= supervised[1]["ts"]

    slices = [event for event in events if event["ph"] == "X" and event["tid"] == WORK_THREAD and event["pid"] == 2]
    (whole,) = [event for event in slices if event["name"] == "attempt"]
    counted = whole["args"]["seconds"]
    assert sum(counted.values()) == pytest.approx(whole["dur"] / 1e6, rel=1e-4)  # every moment has one kind of work
    assert whole["dur"] <= supervised[1]["dur"]
    drawn = own_seconds(slices)
    assert sum(drawn.values()) == pytest.approx(sum(counted.values()) + _imports(slices), rel=1e-3)
    assert {"load", "forward", "statistics", "solve", "write", "verify", "evaluate"} <= {
        work for work, seconds in counted.items() if seconds > 0
    }
    blocks = {event["args"]["block"] for event in slices if event["name"] in ("block", "replay")}
    assert blocks == set(range(BLOCKS))
    assert any(event["args"].get("module") == "mlp" and event["cat"] == "solve" for event in slices)

    report = CompressionReport.model_validate(jobs.report(killed_once.id))
    assert report.time is not None
    spent = sum(one.seconds for one in report.time.spent.values())
    assert spent + report.time.lost.seconds == pytest.approx(report.time.wall_seconds, abs=0.02)
    assert report.time.attempts == 2
    assert report.seconds / report.time.wall_seconds <= report.time.effective_rate < 1.0
    assert report_table(report) is not None


def _imports(slices: list[Event]) -> float:
    return sum(event["dur"] for event in slices if event["name"] == "imports") / 1e6


def test_time_is_credited_once_and_lost_time_is_said() -> None:
    def one(work: str, start: float, seconds: float, name: str = "x", pid: int = 2, /, **args: Any) -> Event:
        times = {"ts": start * 1e6, "dur": seconds * 1e6}
        return {"ph": "X", "tid": WORK_THREAD, "pid": pid, "cat": work, "name": name, "args": args, **times}

    nested = [one("other", 0, 10), one("forward", 1, 6), one("statistics", 2, 1.5), one("solve", 7, 2)]
    assert own_seconds(nested) == pytest.approx({"other": 2, "forward": 4.5, "statistics": 1.5, "solve": 2})
    assert own_seconds([one("load", 0, 1), one("load", 1, 1)]) == pytest.approx({"load": 2})
    events = [
        one("other", 100, 4, "block", 1, step=0, block=0),  # kept for the second attempt
        one("other", 104, 4, "block", 1, step=0, block=1),  # killed before it was kept
        one("other", 120, 20, "attempt", seconds={"other": 8.0, "solve": 12.0}),
        one("other", 121, 6, "block", step=0, block=1),
    ]
    rows = [{"step": 0, "block": 0, "seconds": 4.0}, {"step": 0, "block": 1, "seconds": 6.0}]
    found = job_time(events, began=100.0, ended=140.0, report={"seconds": 20.0, "blocks": rows})
    assert found.wall_seconds == 40.0
    assert found.spent["other"].seconds == 16.0
    assert found.spent["solve"].seconds == 12.0
    assert found.lost.seconds == 12.0
    assert found.effective_rate == pytest.approx((20.0 + 4.0) / 40.0)


def test_a_file_cut_off_by_a_kill_is_read_up_to_there(place: Workplace) -> None:
    folder = place.layout.trace("job-1")
    folder.mkdir(parents=True)
    with TraceFile(folder / "job-1.json", pid=1, zero=1000.0) as file:
        file.named("p", {WATCH_THREAD: "t"})
        file.slice("a", "solve", 1.0, 0.5, depth=1, tid=WORK_THREAD, args={})
        file.slice("short", "solve", 1.0, 1e-5, depth=9, tid=WORK_THREAD, args={})
        assert file.left_out == 1
    path = folder / "job-1.json"
    whole = path.read_text()
    assert [event["name"] for event in json.loads(whole.rstrip().rstrip(",") + "]")] == [
        "process_name",
        "thread_name",
        "a",
    ]
    path.write_text(whole + '{"name": "cut", "ph": "X", "ts": 1')
    assert [event["name"] for event in read_events(place.layout, "job-1")] == ["process_name", "thread_name", "a"]
    assert chrome_trace(place.layout, "job-1")["otherData"]["zero_unix_us"] == 1001e6
