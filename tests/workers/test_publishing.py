"""An artifact appears by one rename, and a crash between the rename and the commit is mended by the next attempt."""

from pathlib import Path

import pytest

from api_schemas.errors import InvalidCheckpoint
from api_schemas.jobs import Job
from job_store.jobs import JobStore
from job_store.layout import Layout, write_whole
from tests.tiny_models import make_tiny_model
from tests.workers.live import add_model
from workers.preparing import describe_job
from workers.publishing import artifact_row, move_into_place
from workers.workplace import Workplace


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "home").prepare()


def folder_with(path: Path, content: bytes) -> Path:
    path.mkdir(parents=True)
    write_whole(path / "config.json", content)
    return path


def test_the_artifact_of_a_dead_worker_gives_way(layout: Layout, tmp_path: Path) -> None:
    folder_with(layout.model("m"), b"stale")
    move_into_place(layout, folder_with(tmp_path / "artifact", b"new"), "m")
    assert (layout.model("m") / "config.json").read_bytes() == b"new"
    assert list((layout.home / "tmp").iterdir()) == []


def test_moving_again_after_a_failed_commit_is_harmless(layout: Layout, tmp_path: Path) -> None:
    artifact = folder_with(tmp_path / "artifact", b"new")
    for _ in range(2):
        move_into_place(layout, artifact, "m")
    assert (layout.model("m") / "config.json").read_bytes() == b"new"


def test_the_row_tells_where_the_artifact_comes_from(place: Workplace, job: Job, tmp_path: Path) -> None:
    claim = place.leases.claim(job.id, "w", 60.0)
    assert claim is not None
    description = describe_job(place, claim)
    row = artifact_row(place.layout, description, make_tiny_model(tmp_path / "artifact"))
    assert (row.parent, row.job, row.origin, row.status) == ("tiny", job.id, "job", "ready")
    assert row.path == str(place.layout.model(description.compressed_model))
    assert row.facts is not None
    assert row.facts["blocks"] == 2
    with pytest.raises(InvalidCheckpoint):
        artifact_row(place.layout, description, folder_with(tmp_path / "broken", b"{"))


def test_a_name_taken_by_somebody_else_is_not_used(place: Workplace, jobs: JobStore, job: Job, tmp_path: Path) -> None:
    claim = place.leases.claim(job.id, "w", 60.0)
    assert claim is not None
    first = describe_job(place, claim).compressed_model
    add_model(place, first, tmp_path)
    second = describe_job(place, claim).compressed_model
    assert second != first
    assert second.startswith(first)
    assert jobs.get(job.id).compressed_model is None
