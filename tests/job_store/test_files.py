"""The file store: content-addressed, shared, reference-counted."""

import threading
from pathlib import Path

import pytest

from api_schemas.errors import Conflict, NotFound
from api_schemas.files import CompleteRequest
from api_schemas.jobs import JobRequest
from job_store.jobs import JobStore
from job_store.settings import Settings
from tests.job_store.api_stores import ApiStores, sha256


@pytest.fixture
def stores(tmp_path: Path) -> ApiStores:
    return ApiStores(Settings(home=tmp_path))


def test_a_file_is_found_by_id_and_by_digest(stores: ApiStores) -> None:
    file = stores.put(b"hello", "greeting.txt")
    assert stores.files.get(file.id) == file
    assert stores.files.find(sha256(b"hello")) == file
    assert stores.files.find(sha256(b"other")) is None
    assert stores.files.path_of(file.id).read_bytes() == b"hello"
    assert stores.files.path_of(file.id) == stores.layout.blob(sha256(b"hello"))


def test_equal_files_share_their_bytes_until_the_last_is_deleted(stores: ApiStores) -> None:
    first, second = stores.put(b"same"), stores.put(b"same")
    blob = stores.files.path_of(first.id)
    assert first.id != second.id
    assert stores.files.path_of(second.id) == blob
    stores.files.delete(first.id)
    assert blob.read_bytes() == b"same"
    stores.files.delete(second.id)
    assert not blob.exists()
    with pytest.raises(NotFound, match=second.id):
        stores.files.get(second.id)


def test_deleting_a_file_that_an_upload_made(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    part = stores.send(upload.id, b"abc")
    done = stores.uploads.complete(upload.id, CompleteRequest(part_ids=(part.id,)))
    assert done.file is not None
    stores.files.delete(done.file.id)
    assert stores.uploads.get(upload.id).file is None


def test_lists_page_newest_first(stores: ApiStores) -> None:
    made = []
    for index in range(5):
        made.append(stores.put(bytes([index]), purpose="calibration" if index == 2 else "model").id)
        stores.clock.now += index % 2  # some share their second
    first = stores.files.list(after=None, limit=3)
    second = stores.files.list(after=first.last_id, limit=3)
    assert (first.has_more, second.has_more) == (True, False)
    listed = [file.id for file in (*first.data, *second.data)]
    assert sorted(listed) == sorted(made)
    assert listed[0] in made[-2:]
    assert [file.id for file in stores.files.list(after=None, limit=9, purpose="calibration").data] == [made[2]]
    with pytest.raises(NotFound, match="file-gone"):
        stores.files.list(after="file-gone", limit=3)


def test_a_file_that_a_waiting_job_reads_stays(stores: ApiStores) -> None:
    file = stores.put(b"text", "text.txt", "calibration")
    jobs = JobStore(stores.engine)
    recipe = {
        "steps": [{"method": "modegpt", "sparsity": 0.2}],
        "evaluation": {"source": "upload", "file_id": file.id},
    }
    job, _ = jobs.create(JobRequest.model_validate({"model": "m", "recipe": recipe}), recipe_hash="0" * 64)
    with pytest.raises(Conflict, match=job.id) as caught:
        stores.files.delete(file.id)
    assert caught.value.code == "file_in_use"
    jobs.request_cancel(job.id)
    stores.files.delete(file.id)


def test_the_sweep_removes_what_a_crash_left(stores: ApiStores) -> None:
    kept = stores.put(b"kept")
    orphan = stores.layout.blob(sha256(b"orphan"))
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"orphan")
    stray = stores.layout.scratch("file")
    stray.write_bytes(b"half")
    stores.files.sweep(older_than=3600)
    assert stray.exists()  # it may be under way in another process
    stores.files.sweep(older_than=-1)
    assert not orphan.exists()
    assert not stray.exists()
    assert stores.files.path_of(kept.id).exists()


def test_equal_files_stored_and_deleted_at_once(stores: ApiStores) -> None:
    """A delete must never take the bytes of a row that another thread has just written."""
    missing: list[str] = []

    def work() -> None:
        for _ in range(15):
            file = stores.put(b"contended")
            if not stores.files.path_of(file.id).exists():
                missing.append(file.id)
            stores.files.delete(file.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missing == []
    assert not stores.layout.blob(sha256(b"contended")).exists()


@pytest.mark.parametrize("hostile", ["file-\0", "../../etc/passwd", "", "x" * 10_000])
def test_hostile_ids_are_not_found(stores: ApiStores, hostile: str) -> None:
    with pytest.raises(NotFound):
        stores.files.get(hostile)
