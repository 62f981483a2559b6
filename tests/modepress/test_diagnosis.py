"""`modepress doctor JOB`: each way in which a job can end badly, or hang, has an explanation and a remedy."""

import ast
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_schemas.jobs import Job, JobRequest
from api_schemas.workers import SelfCheck
from job_store.jobs import JobStore
from job_store.settings import Settings
from job_store.workers import WorkerStore
from modepress.commands.job_commands import status_lines
from modepress.diagnosis import REMEDIES, Finding, diagnose
from tests.workers.conftest import RECIPE, SCRIPT
from tests.workers.live import add_model
from tests.workers.test_heartbeats import PULSES
from workers.supervisor import Supervisor
from workers.vital_signs import VitalSigns
from workers.workplace import Workplace, open_workplace

ROOT = Path(__file__).parents[2]


def codes_of_failures() -> set[str]:
    """The first argument of every `JobFailed(…)`, `_crashed(…)`, and each `code=` of a worker's own errors."""
    found = set()
    for path in [*(ROOT / "compression").rglob("*.py"), *(ROOT / "workers").glob("*.py"), ROOT / "job_store/leases.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[0] if node.args else None
            if name in ("JobFailed", "_crashed") and isinstance(first, ast.Constant):
                found.add(first.value)
            if name == "ErrorBody":
                found |= {k.value.value for k in node.keywords if k.arg == "code" and isinstance(k.value, ast.Constant)}
    return found


def test_each_code_of_a_failed_job_is_explained() -> None:
    codes = codes_of_failures()
    assert {"not_finite", "job_stalled", "out_of_memory", "disk_full", "worker_lost", "job_process_killed"} <= codes
    assert codes - set(REMEDIES) == set()
    assert all(what and remedy for what, remedy in REMEDIES.values())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    settings = Settings(
        home=tmp_path / "home",
        broker_url=f"filesystem://{tmp_path / 'broker'}",
        max_attempts=1,
        threads=1,
        stall_seconds=1.0,
        heartbeat_seconds=0.2,
    )
    place = open_workplace(settings)
    add_model(place, "tiny", tmp_path / "tiny")
    yield place
    place.engine.dispose()


def submit(place: Workplace) -> Job:
    request = JobRequest.model_validate({"model": "tiny", "recipe": RECIPE})
    return JobStore(place.engine).create(request, recipe_hash="0" * 64)[0]


def findings(place: Workplace, job_id: str, later: float = 0.0) -> list[Finding]:
    jobs = JobStore(place.engine)
    job, events = jobs.get(job_id), jobs.events(job_id, after=0, limit=1000).data
    assert status_lines(job, time.time()).startswith(f"job {job_id}: ")
    return diagnose(job, events, WorkerStore(place.engine).list(), time.time() + later)


@pytest.mark.parametrize(
    ("body", "words", "evidence"),
    [
        (f"{PULSES}\npulse(1)\nhang_here()", "did not move", "in hang_here"),
        ("print('one line', flush=True); os.kill(os.getpid(), 9)", "ended by a signal", "| one line"),
        ("sys.exit(12)", "no space was left", "disk_full: "),
        ("raise ValueError('a bug')", "fault of ours", "ValueError: a bug"),
        ("""result(status="failed", error={"message": "m", "type": "t", "param": "p", "code": "too_short"})
sys.exit(10)""", "was refused", "too_short: m"),
    ],
)  # fmt: skip
def test_a_failed_job_is_explained(place: Workplace, tmp_path: Path, body: str, words: str, evidence: str) -> None:
    job = submit(place)
    script = tmp_path / "job_process.py"
    script.write_text(SCRIPT + body)
    Supervisor(place, command=(sys.executable, str(script))).run(job.id)
    first = findings(place, job.id)[0]
    assert words in first.what
    assert first.remedy
    assert any(evidence in line for line in first.evidence), first.evidence


def test_a_job_that_waits_says_for_what(place: Workplace) -> None:
    job, workers = submit(place), WorkerStore(place.engine)
    assert "none was ever started" in findings(place, job.id)[0].what
    broken = SelfCheck(name="disk", result="fail", detail="cannot be written")
    worker_id = workers.add("w1", "c", "failed", [broken], 0.0)
    (found,) = findings(place, job.id)
    assert ("takes no work" in found.what, found.evidence) == (True, ("disk: cannot be written",))
    workers.add("w2", "c", "ready", [], 0.0)
    assert findings(place, job.id)[0].what == "it waits for one of 1 workers"
    workers.seen(worker_id, stopped=True)
    assert findings(place, job.id)[0].what == "it waits for one of 1 workers"


def test_a_job_at_work_is_well_until_it_is_not(place: Workplace) -> None:
    job = submit(place)
    claim = place.leases.claim(job.id, "worker", 90.0)
    assert claim is not None
    beat = VitalSigns(place, claim, 1, place.layout.home / "none").heartbeat()
    place.leases.beat(job.id, claim.fence, beat, said=None)
    assert findings(place, job.id) == []
    assert "no heartbeat for" in findings(place, job.id, later=100.0)[0].what
    still = beat.model_copy(update={"progress_age_seconds": 0.6 * beat.stalls_after_seconds, "keywords": {"Xid": 2}})
    place.leases.beat(job.id, claim.fence, still, said=None)
    assert ["has not moved" in one.what or "Xid (2)" in one.what for one in findings(place, job.id)] == [True, True]
    place.leases.note(job.id, claim.fence, "block 3 was solved again: x; transient", level="warn", data={})
    assert "1 blocks looked wrong" in findings(place, job.id)[-1].what
