"""A disk that fills up while a real job runs: a named failure, nothing half-made, and the service goes on."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_schemas.jobs import Job, JobRequest
from job_store.database import reading
from job_store.jobs import JobStore
from job_store.settings import Settings
from job_store.tables import ModelRow
from tests.servers import wait_until
from tests.tiny_models import make_tiny_model
from tests.workers.live import RECIPE, add_model
from workers.supervisor import JOB_PROCESS, Supervisor
from workers.workplace import Workplace, open_workplace

SMALL_FILES = ("bash", "-c", 'ulimit -f "$0" && exec "$@"')  # a limit on every file, in KiB
TMPFS_BYTES = 64 * 1024**2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model", layers=6, hidden=128, intermediate=512)


def submit(place: Workplace) -> Job:
    request = JobRequest.model_validate({"model": "tiny", "recipe": RECIPE})
    return JobStore(place.engine).create(request, recipe_hash="0" * 64)[0]


def assert_failed_without_a_trace(place: Workplace, job_id: str) -> None:
    job = JobStore(place.engine).get(job_id)
    assert job.error is not None
    assert (job.status, job.attempt, job.compressed_model, job.error.code) == ("failed", 1, None, "disk_full")
    assert "free some" in job.error.message
    assert {path.name for path in place.layout.job(job_id).iterdir()} <= {"job.json", "log.txt", "trace"}
    assert list((place.layout.home / "models").iterdir()) == []
    with reading(place.engine) as session:
        assert [row.id for row in session.query(ModelRow)] == ["tiny"]


# blocks of the tiny model have 600 KiB: at 300 the first block cannot be kept, at 1500 the artifact cannot be written
@pytest.mark.parametrize("kibibytes", [300, 1500])
def test_no_room_for_a_file(place: Workplace, model: Path, kibibytes: int) -> None:
    add_model(place, "tiny", model)
    job = submit(place)
    Supervisor(place, command=(*SMALL_FILES, str(kibibytes), *JOB_PROCESS)).run(job.id)
    assert_failed_without_a_trace(place, job.id)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk; test_no_room_for_a_file covers the same path")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_disk_fills_up_between_blocks(small_disk: Path, tmp_path: Path, model: Path) -> None:
    settings = Settings(
        home=small_disk / "home",
        database_url=f"sqlite:///{tmp_path / 'elsewhere.db'}",
        broker_url=f"filesystem://{tmp_path / 'broker'}",
        threads=1,
    )
    place = open_workplace(settings)
    add_model(place, "tiny", model)
    first = submit(place)
    supervisor = threading.Thread(target=Supervisor(place).run, args=(first.id,))
    supervisor.start()
    wait_until(lambda: list(place.layout.blocks(first.id).glob("*/block-*.json")), seconds=120, what="a block")
    fill(small_disk / "filler")
    supervisor.join(120)
    assert_failed_without_a_trace(place, first.id)
    (small_disk / "filler").unlink()
    second = submit(place)
    Supervisor(place).run(second.id)
    assert JobStore(place.engine).get(second.id).status == "succeeded"
    place.engine.dispose()


def fill(path: Path) -> None:
    """Write until there is no room left."""
    piece = bytes(65536)
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(piece)
            except OSError:
                return
