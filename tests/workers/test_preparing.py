"""What a job process is told, and what was deleted before it could start."""

import os

import pytest

from api_schemas.errors import NotFound
from api_schemas.jobs import JobRequest
from job_store.database import writing
from job_store.jobs import JobStore
from job_store.layout import write_whole
from job_store.leases import Claim
from job_store.tables import FileRow
from tests.workers.conftest import RECIPE
from tests.workers.live import add_model
from workers.description import JobDescription
from workers.preparing import describe_job, make_attempt_folder
from workers.workplace import Workplace


@pytest.fixture
def claim(place: Workplace, jobs: JobStore) -> Claim:
    """A claim on a job whose calibration text was uploaded as `file-1`."""
    add_model(place, "tiny", place.layout.home / "tiny")
    uploaded = {"source": "upload", "file_id": "file-1", "num_samples": 4, "sequence_length": 64}
    request = {"model": "tiny", "recipe": {**RECIPE, "calibration": uploaded}}
    job, _ = jobs.create(JobRequest.model_validate(request), recipe_hash="0" * 64)
    claim = place.leases.claim(job.id, "w", 60.0)
    assert claim is not None
    return claim


def test_an_uploaded_text_is_found_by_its_digest(place: Workplace, claim: Claim) -> None:
    with writing(place.engine) as session:
        session.add(FileRow(id="file-1", created_at=0.0, filename="a", purpose="calibration", bytes=1, sha256="a" * 64))
    description = describe_job(place, claim)
    assert description.files == {"file-1": str(place.layout.blob("a" * 64))}
    assert (description.source, description.threads) == (str(place.layout.home / "tiny"), 1)


def test_a_deleted_text_is_named(place: Workplace, claim: Claim) -> None:
    with pytest.raises(NotFound) as caught:
        describe_job(place, claim)
    assert caught.value.code == "file_not_found"


def test_an_attempt_starts_clean_but_for_finished_blocks(place: Workplace, claim: Claim) -> None:
    with writing(place.engine) as session:
        session.add(FileRow(id="file-1", created_at=0.0, filename="a", purpose="calibration", bytes=1, sha256="a" * 64))
    folder = place.layout.job(claim.job_id)
    for name in ("attempt-0", "blocks"):
        (folder / name).mkdir(parents=True)
        write_whole(folder / name / "kept", b"")
    description = describe_job(place, claim)
    make_attempt_folder(place, claim, description)
    assert sorted(os.listdir(folder)) == ["attempt-1", "blocks", "job.json", "trace"]
    assert (folder / "blocks" / "kept").exists()
    assert JobDescription.model_validate_json((folder / "job.json").read_bytes()) == description
