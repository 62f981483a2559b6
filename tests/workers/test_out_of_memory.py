"""Memory that cannot be had: one more attempt in smaller pieces, then a named failure. Real processes under a limit."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from api_schemas.jobs import Job, JobRequest
from job_store.jobs import JobStore
from tests.tiny_models import make_tiny_model
from tests.workers.live import add_model
from workers.outcome import Crashed, OutOfMemory, classify
from workers.supervisor import Supervisor
from workers.workplace import Workplace

MIB = 1024**2
# The limit counts from what the process has once everything is imported: that differs between machines.
LIMITED = """
import resource, sys
from pathlib import Path
import torch, transformers
import compression.pipeline, workers.job_process
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(workers.job_process.main(Path(sys.argv[2])))
"""


def limited(tmp_path: Path, mebibytes: int) -> tuple[str, ...]:
    path = tmp_path / "limited.py"
    path.write_text(LIMITED)
    return sys.executable, str(path), str(mebibytes * MIB)


@pytest.fixture
def wide(place: Workplace, jobs: JobStore, tmp_path: Path) -> Job:
    """A job whose queries take 128 MiB with 2048 tokens at once, 32 MiB with 512; keys and values as much again."""
    folder = make_tiny_model(tmp_path / "wide", layers=2, hidden=64, heads=64, kv_heads=64, head_dim=256)
    add_model(place, "wide", folder)
    text = {"source": "builtin", "sequence_length": 64}
    recipe = {
        "steps": [
            {"method": "modegpt", "mode": "reference", "layout": "full", "sparsity": 0.01, "modules": ["value_output"]}
        ],
        "calibration": {**text, "num_samples": 32},
        "evaluation": {**text, "num_windows": 2, "generation_tokens": 0},
    }
    request = JobRequest.model_validate({"model": "wide", "recipe": recipe})
    return jobs.create(request, recipe_hash="0" * 64)[0]


def test_out_of_memory_is_tried_once_more_in_smaller_pieces(
    place: Workplace, jobs: JobStore, wide: Job, tmp_path: Path
) -> None:
    supervisor = Supervisor(place, command=limited(tmp_path, 640))
    supervisor.run(wide.id)
    again, events = jobs.get(wide.id), jobs.events(wide.id, after=0, limit=100).data
    assert (again.status, again.attempt) == ("queued", 1), [event.message for event in events]
    assert "ran out of memory" in events[-1].message
    assert "smaller pieces" in events[-1].message
    supervisor.run(wide.id)
    ended = jobs.get(wide.id)
    assert (ended.status, ended.attempt) == ("succeeded", 2), ended.error
    assert any("512 tokens at once instead of 2048" in warning for warning in jobs.report(wide.id)["warnings"])


def test_out_of_memory_again_fails_by_name(place: Workplace, jobs: JobStore, wide: Job, tmp_path: Path) -> None:
    supervisor = Supervisor(place, command=limited(tmp_path, 30))
    for _ in range(2):
        supervisor.run(wide.id)
    ended = jobs.get(wide.id)
    assert ended.error is not None
    assert (ended.status, ended.attempt, ended.error.code) == ("failed", 2, "out_of_memory")  # of three allowed
    assert "more memory" in ended.error.message


@pytest.mark.parametrize(
    ("log", "returncode", "kills", "kind"),
    [
        ("", -9, 1, OutOfMemory),
        ("", -9, 0, Crashed),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n", -6, 0, OutOfMemory),
        ("some assertion failed\n", -6, 0, Crashed),
        ("", -11, 1, Crashed),  # the kernel killed somebody, but this one died otherwise
        ("MemoryError\n", 13, 0, OutOfMemory),
    ],
)
def test_deaths_of_memory_are_told_from_others(
    tmp_path: Path, log: str, returncode: int, kills: int, kind: type
) -> None:
    (tmp_path / "log.txt").write_text(log)
    assert isinstance(classify(returncode, tmp_path, oom_kills=kills), kind)


def test_the_attempt_after_out_of_memory_is_told_to_work_in_small(
    place: Workplace, jobs: JobStore, job: Job, script: Callable[[str], tuple[str, str]]
) -> None:
    body = """
chunk = json.loads((attempt.parent / "job.json").read_text())["chunk_tokens"]
if chunk == 2048:
    sys.exit(13)
result(status="failed", error={"message": str(chunk), "type": "t", "param": None, "code": "seen"})
sys.exit(10)
"""
    for _ in range(2):
        Supervisor(place, command=script(body)).run(job.id)
    error = jobs.get(job.id).error
    assert error is not None
    assert (error.code, error.message) == ("seen", "512")
