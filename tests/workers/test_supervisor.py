"""The supervisor over real processes that talk, fall silent, crash, and refuse to die."""

import threading
from collections.abc import Callable

import psutil
import pytest
from sqlalchemy import delete

from api_schemas.jobs import Job
from job_store.database import writing
from job_store.jobs import JobStore
from job_store.layout import write_whole
from job_store.leftovers import sweep
from job_store.queue import depth
from job_store.tables import ModelRow
from tests.servers import wait_until
from workers.supervisor import Supervisor
from workers.workplace import Workplace

Script = Callable[[str], tuple[str, str]]


def messages(jobs: JobStore, job: Job) -> list[str]:
    return [event.message for event in jobs.events(job.id, after=0, limit=100).data]


def nothing_left(place: Workplace, job: Job) -> bool:
    left = {path.name for path in place.layout.job(job.id).iterdir()}
    return left <= {"job.json", "log.txt", "trace"} and list((place.layout.home / "models").iterdir()) == []


def start(place: Workplace, job: Job, command: tuple[str, str], **more: object) -> threading.Thread:
    thread = threading.Thread(target=Supervisor(place, command=command, **more).run, args=(job.id,), daemon=True)
    thread.start()
    return thread


def test_a_user_fault_fails_the_job_at_once(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    command = script("""
say("block done", 40.0, block=2, blocks_total=6)
result(status="failed", error={"message": "m", "type": "invalid_request_error", "param": "p", "code": "too_short"})
sys.exit(10)
""")
    Supervisor(place, command=command).run(job.id)
    ended = jobs.get(job.id)
    assert ended.error is not None
    assert (ended.status, ended.attempt, ended.error.code, ended.error.param) == ("failed", 1, "too_short", "p")
    assert (ended.progress.block, ended.progress.percent) == (2, 40.0)
    assert "block done" in messages(jobs, job)
    assert (ended.usage.seconds or 0) > 0
    assert nothing_left(place, job)


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "job_process_killed", "out of memory"),
        ("os.abort()", "job_process_killed", "SIGABRT"),
        ("raise ValueError('a bug')", "job_process_failed", "ValueError: a bug"),
        ("sys.exit(0)", "job_process_failed", "no sound result"),
        ("(attempt / 'result.json').write_text('{'); sys.exit(0)", "job_process_failed", "no sound result"),
        ("sys.exit(11)", "job_process_stopped", "told to stop"),
    ],
)
def test_a_crash_is_retried_until_attempts_are_used_up(
    place: Workplace, jobs: JobStore, job: Job, script: Script, body: str, code: str, reason: str
) -> None:
    supervisor = Supervisor(place, command=script(body))
    for attempt in (1, 2):
        supervisor.run(job.id)
        again = jobs.get(job.id)
        assert (again.status, again.attempt) == ("queued", attempt)
        assert reason in messages(jobs, job)[-1]
        assert depth("compress", broker_url=place.settings.broker_url) == attempt
    supervisor.run(job.id)
    ended = jobs.get(job.id)
    assert ended.error is not None
    assert (ended.status, ended.error.code) == ("failed", code)
    assert nothing_left(place, job)
    supervisor.run(job.id)  # a late duplicate
    assert jobs.get(job.id) == ended


def test_a_second_attempt_keeps_the_blocks_of_the_first(
    place: Workplace, jobs: JobStore, job: Job, script: Script
) -> None:
    command = script("""
blocks = attempt.parent / "blocks"
if not (blocks / "0").exists():
    (blocks / "0").write_text("solved")
    os.kill(os.getpid(), signal.SIGKILL)
assert [path.name for path in attempt.parent.glob("attempt-*")] == ["attempt-2"]
result(status="failed", error={"message": (blocks / "0").read_text(), "type": "t", "param": None, "code": "seen"})
sys.exit(10)
""")
    for _ in range(2):
        Supervisor(place, command=command).run(job.id)
    error = jobs.get(job.id).error
    assert error is not None
    assert (error.code, error.message) == ("seen", "solved")


def test_cancel_stops_a_willing_process(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    thread = start(place, job, script("say('at work'); time.sleep(600)"))
    wait_until(lambda: "at work" in messages(jobs, job))
    jobs.request_cancel(job.id)
    thread.join(10)
    assert not thread.is_alive()
    assert jobs.get(job.id).status == "cancelled"
    assert nothing_left(place, job)


def test_cancel_kills_an_unwilling_process_and_its_children(
    place: Workplace, jobs: JobStore, job: Job, script: Script
) -> None:
    command = script("""
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
say(f"{os.getpid()} {child.pid}")
time.sleep(600)
""")
    thread = start(place, job, command)
    pids = wait_until(lambda: [m for m in messages(jobs, job) if m.replace(" ", "").isdigit()])[0].split()
    jobs.request_cancel(job.id)
    thread.join(10)
    assert not thread.is_alive()
    assert jobs.get(job.id).status == "cancelled"
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), what="death of the group")


def test_a_fenced_off_supervisor_kills_its_process_and_writes_nothing(
    place: Workplace, jobs: JobStore, job: Job, script: Script
) -> None:
    thread = start(place, job, script("say(str(os.getpid()))\nwhile True: time.sleep(0.1); say('again')"))
    pid = int(wait_until(lambda: [m for m in messages(jobs, job) if m.isdigit()])[0])
    place.leases.renew(job.id, 1, -1.0)  # as if it had been silent for too long
    claim = wait_until(lambda: place.leases.claim(job.id, "another worker", 60.0))
    thread.join(10)
    assert not thread.is_alive()
    assert not psutil.pid_exists(pid)
    assert claim.fence == 2
    assert messages(jobs, job)[-1].startswith("Attempt 2 started by another worker")
    assert not place.layout.attempt(job.id, 1).exists()
    assert place.leases.standing(job.id, 2) == "running"


def test_the_lease_outlives_a_silent_process(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    # longer than the lease: without renewal the reaper would take the job away
    thread = start(place, job, script(f"time.sleep({place.settings.lease_seconds + 2})\n{FAULT}"))
    while thread.is_alive():
        assert place.leases.reap() == []
        thread.join(0.2)
    assert jobs.get(job.id).attempt == 1
    assert jobs.get(job.id).status == "failed"


FAULT = """
result(status="failed", error={"message": "m", "type": "t", "param": None, "code": "c"})
sys.exit(10)
"""


def test_a_stopping_worker_gives_the_job_back(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    stop = threading.Event()
    thread = start(place, job, script("say('at work'); time.sleep(600)"), stopping=stop.is_set)
    wait_until(lambda: "at work" in messages(jobs, job))
    stop.set()
    thread.join(10)
    back = jobs.get(job.id)
    assert (back.status, back.attempt) == ("queued", 0)
    assert depth("compress", broker_url=place.settings.broker_url) == 1


def test_a_full_disk_is_named(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    Supervisor(place, command=script("sys.exit(12)")).run(job.id)
    error = jobs.get(job.id).error
    assert error is not None
    assert error.code == "disk_full"
    assert nothing_left(place, job)


def test_a_deleted_model_fails_the_job(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    with writing(place.engine) as session:
        session.execute(delete(ModelRow))
    Supervisor(place, command=script("")).run(job.id)
    error = jobs.get(job.id).error
    assert error is not None
    assert (error.code, error.param) == ("model_not_found", "model")


def test_words_that_are_no_events_do_no_harm(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    Supervisor(place, command=script(f"os.write(pipe, b'no event\\n{{}}\\n'); say('an event')\n{FAULT}")).run(job.id)
    assert "an event" in messages(jobs, job)
    assert jobs.get(job.id).error is not None


def test_secrets_stay_with_the_supervisor(
    place: Workplace, jobs: JobStore, job: Job, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEPRESS_DATABASE_URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("MODEPRESS_BROKER_URL", "redis://:hunter2@h")
    command = script(f"say('leak' if any('hunter2' in value for value in os.environ.values()) else 'clean')\n{FAULT}")
    Supervisor(place, command=command).run(job.id)
    assert "clean" in messages(jobs, job)


def test_what_a_dead_worker_left_is_swept_once_the_job_has_ended(
    place: Workplace, jobs: JobStore, job: Job, script: Script
) -> None:
    Supervisor(place, command=script("os.kill(os.getpid(), signal.SIGKILL)")).run(job.id)
    sweep(place.engine, place.layout)
    assert place.layout.blocks(job.id).exists()  # the job is queued: its blocks are wanted
    jobs.request_cancel(job.id)
    name = "tiny-modegpt-25pct-portable-" + job.id[4:10]
    place.layout.model(name).mkdir()  # moved into place, but the transaction was never committed
    write_whole(place.layout.model(name) / "config.json", b"{}")
    sweep(place.engine, place.layout)
    assert nothing_left(place, job)


def test_a_slow_block_is_said(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    command = script(f"""
for number, seconds in enumerate([1.0] * 6 + [2.0, 1.0]):
    say(f"block {{number}}", block=number, data={{"kind": "k", "seconds": seconds}})
say("from an earlier attempt", block=9, data={{"seconds": 9.0}})
{FAULT}""")
    Supervisor(place, command=command).run(job.id)
    slow = [
        (event.message, event.data) for event in jobs.events(job.id, after=0, limit=100).data if event.level == "warn"
    ]
    assert [message for message, _ in slow] == ["Block 7 was slow: 2 s, where the median is 1 s"]
    assert slow[0][1]["straggler"] is False
