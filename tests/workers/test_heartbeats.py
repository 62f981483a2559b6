"""Heartbeats say what a job does; a process that lives but does not move is told from one that is dead."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from api_schemas.jobs import Job
from job_store.jobs import JobStore
from job_store.settings import Settings
from tests.servers import wait_until
from workers.supervisor import Supervisor
from workers.vital_signs import LINE_LENGTH, LINES, LogWatch
from workers.workplace import Workplace

Script = Callable[[str], tuple[str, str]]
PULSES = """
import faulthandler
faulthandler.register(signal.SIGUSR1, (attempt / "stacks.txt").open("w"))
def pulse(number, tokens=0, **more):
    told = {"number": number, "work": "solve", "tokens": tokens, "flops": tokens * 1e3, **more}
    os.write(pipe, json.dumps({"pulse": told}).encode() + b"\\n")
def hang_here():
    while True: time.sleep(0.05)
"""
FAULT = """
result(status="failed", error={"message": "m", "type": "t", "param": None, "code": "c"})
sys.exit(10)
"""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"heartbeat_seconds": 0.2, "heartbeat_event_seconds": 1.5, "stall_seconds": 2.0, "peak_flops": 1e12}
    )


def events(jobs: JobStore, job: Job) -> list[tuple[str, dict]]:
    return [(event.message, event.data) for event in jobs.events(job.id, after=0, limit=1000).data]


def start(place: Workplace, job: Job, command: tuple[str, str]) -> threading.Thread:
    thread = threading.Thread(target=Supervisor(place, command=command).run, args=(job.id,), daemon=True)
    thread.start()
    return thread


def test_a_heartbeat_says_what_the_job_does(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    where = 'stage="compressing", block=2, module="mlp"'
    command = script(f"""{PULSES}
print("loss is nan", flush=True)
print("redis://user:secret@host went away", flush=True)
for number in range(1, 60):
    pulse(number, number * 1000, {where})
    time.sleep(0.05)
    if (attempt / "enough").exists(): break
hang_here() if not (attempt / "enough").exists() else None
{FAULT}""")
    thread = start(place, job, command)
    beat = wait_until(
        lambda: next((b for b in [jobs.get(job.id).heartbeat] if b and b.tokens_per_second and b.keywords), None)
    )
    said = wait_until(lambda: [(m, d) for m, d in events(jobs, job) if m.startswith("Heartbeat")], what="an event")
    (place.layout.attempt(job.id, 1) / "enough").touch()
    thread.join(20)
    assert (beat.stage, beat.block, beat.module, beat.work) == ("compressing", 2, "mlp", "solve")
    assert (beat.attempt, beat.fence, beat.worker, beat.child_alive) == (1, 1, place.owner, True)
    assert beat.flops_per_second == pytest.approx(1e3 * beat.tokens_per_second)
    assert beat.mfu == pytest.approx(beat.flops_per_second / 1e12)
    assert beat.rss_bytes is not None
    assert beat.rss_bytes > 1e6
    assert beat.disk_free_bytes > 0
    assert beat.gpu_memory_bytes is None
    assert beat.keywords == {"nan": 1}
    assert beat.last_log_lines == ("loss is nan", "redis://***@host went away")
    assert "compressing block 3 mlp solve" in said[0][0]
    assert said[0][1]["heartbeat"]["module"] == "mlp"
    last = jobs.get(job.id).heartbeat
    assert last is not None
    assert last.progress_number >= beat.progress_number


def test_without_a_stated_peak_there_is_no_mfu(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    unknown = place.settings.model_copy(update={"peak_flops": 0.0})
    plain = Workplace(unknown, place.engine, place.layout, place.leases)
    command = script(f"{PULSES}\nfor n in range(60): pulse(n, n); time.sleep(0.05)\n{FAULT}")
    thread = start(plain, job, command)
    beat = wait_until(lambda: next((b for b in [jobs.get(job.id).heartbeat] if b and b.flops_per_second), None))
    thread.join(20)
    assert beat.mfu is None


def test_a_stalled_process_is_dumped_killed_and_tried_again(
    place: Workplace, jobs: JobStore, job: Job, script: Script
) -> None:
    supervisor = Supervisor(place, command=script(f"{PULSES}\npulse(1, stage='compressing', block=4)\nhang_here()"))
    supervisor.run(job.id)
    again = jobs.get(job.id)
    assert (again.status, again.attempt) == ("queued", 1)
    (data,) = [data for message, data in events(jobs, job) if "lived but did not move" in message]
    assert "in hang_here" in data["stack"]
    assert data["where"] == "compressing block 5 solve"
    for _ in range(2):
        supervisor.run(job.id)
    ended = jobs.get(job.id)
    assert ended.error is not None
    assert (ended.status, ended.attempt, ended.error.code) == ("failed", 3, "job_stalled")
    assert "MODEPRESS_STALL_SECONDS" in ended.error.message


def test_a_suspended_process_stalls_too_but_leaves_no_stack(
    place: Workplace, jobs: JobStore, job: Job, script: Script
) -> None:
    thread = start(place, job, script(f"{PULSES}\nsay(str(os.getpid()))\nhang_here()"))
    pid = int(wait_until(lambda: [m for m, _ in events(jobs, job) if m.isdigit()])[0])
    os.kill(pid, signal.SIGSTOP)
    thread.join(20)
    assert not thread.is_alive()
    assert jobs.get(job.id).status == "queued"
    (data,) = [data for message, data in events(jobs, job) if "lived but did not move" in message]
    assert data["stack"] == "the process did not answer, not even with its stack"


def test_a_slow_process_that_moves_is_left_alone(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    # four seconds, twice the limit, but never silent for more than half a second
    Supervisor(place, command=script(f"{PULSES}\nfor n in range(8): pulse(n); time.sleep(0.5)\n{FAULT}")).run(job.id)
    ended = jobs.get(job.id)
    assert ended.error is not None
    assert (ended.status, ended.error.code, ended.attempt) == ("failed", "c", 1)


def test_a_fenced_off_worker_writes_no_heartbeat(place: Workplace, jobs: JobStore, job: Job, script: Script) -> None:
    thread = start(place, job, script(f"{PULSES}\nn = 0\nwhile True: n += 1; pulse(n); time.sleep(0.05)"))
    wait_until(lambda: jobs.get(job.id).heartbeat)
    place.leases.renew(job.id, 1, -1.0)
    assert wait_until(lambda: place.leases.claim(job.id, "another worker", 60.0)).fence == 2
    thread.join(10)
    beat = jobs.get(job.id).heartbeat
    assert beat is not None
    assert beat.fence == 1
    assert not place.leases.beat(job.id, 1, beat, said=None)
    assert place.leases.beat(job.id, 2, beat, said=None)


def test_a_log_is_read_once_and_bounded(tmp_path: Path) -> None:
    log = LogWatch(tmp_path / "log.txt")
    log.look()
    lines = [f"{number} CUDA error" + "x" * 1000 for number in range(LINES * 3)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n\x1b[31mnano bananas\nKil")
    log.look()
    log.look()
    with (tmp_path / "log.txt").open("a") as file:
        file.write("led\n")
    log.look()
    assert log.keywords == {"CUDA error": LINES * 3, "Killed": 1}
    assert len(log.lines) == LINES
    assert max(map(len, log.lines)) == LINE_LENGTH
    assert list(log.lines)[-2:] == ["[31mnano bananas", "Killed"]
