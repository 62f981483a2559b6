"""A workplace with one ready model and one queued job, and scripts that play the part of a job process."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api_schemas.jobs import Job, JobRequest
from job_store.jobs import JobStore
from job_store.settings import Settings
from tests.workers.live import add_model
from workers.workplace import Workplace, open_workplace

RECIPE = {
    "steps": [{"method": "modegpt", "sparsity": 0.25, "round_to": 1}],
    "calibration": {"source": "builtin", "num_samples": 4, "sequence_length": 64},
    "evaluation": {"source": "builtin", "num_windows": 2, "sequence_length": 64, "generation_tokens": 0},
}

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
attempt = Path(sys.argv[1])
pipe = int(os.environ["MODEPRESS_EVENTS_FD"])
def say(message, percent=50.0, **more):
    event = {"message": message, "stage": "compressing", "percent": percent, **more}
    os.write(pipe, json.dumps(event).encode() + b"\\n")
def result(**more):
    whole = {"status": "succeeded", "report": None, "error": None, "peak_rss_bytes": 1, **more}
    (attempt / "result.json").write_text(json.dumps(whole))
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        broker_url=f"filesystem://{tmp_path / 'broker'}",
        lease_seconds=6.0,
        renew_seconds=0.5,
        cancel_grace_seconds=1.0,
        threads=1,
    )


@pytest.fixture
def place(settings: Settings) -> Iterator[Workplace]:
    place = open_workplace(settings)
    yield place
    place.engine.dispose()


@pytest.fixture
def jobs(place: Workplace) -> JobStore:
    return JobStore(place.engine)


@pytest.fixture
def job(place: Workplace, jobs: JobStore, tmp_path: Path) -> Job:
    add_model(place, "tiny", tmp_path / "tiny")
    return jobs.create(JobRequest.model_validate({"model": "tiny", "recipe": RECIPE}), recipe_hash="0" * 64)[0]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], tuple[str, str]]:
    """Turn the body of a script into a command that plays the job process: `say`, `result` and `attempt` are there."""

    def write(body: str) -> tuple[str, str]:
        path = tmp_path / "job_process.py"
        path.write_text(SCRIPT + body)
        return sys.executable, str(path)

    return write
