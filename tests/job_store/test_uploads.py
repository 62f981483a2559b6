"""Resumable uploads (T26): any order, repeated, wrong digest, wrong size, resumed, in parallel, expired."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api_schemas.errors import Conflict, InvalidRequest, ModepressError, NotFound, TooLarge
from api_schemas.files import CompleteRequest
from job_store.settings import Settings
from tests.job_store.api_stores import ApiStores, sha256

DATA = b"".join(hashlib.sha256(bytes([index])).digest() for index in range(32))[:1000]
PIECES = [DATA[start : start + 100] for start in range(0, 1000, 100)]


@pytest.fixture
def stores(tmp_path: Path) -> ApiStores:
    return ApiStores(Settings(home=tmp_path, max_part_bytes=200, max_upload_bytes=5000, upload_ttl_seconds=60))


def complete(stores: ApiStores, upload_id: str, *part_ids: str, **digests: str) -> bytes:
    done = stores.uploads.complete(upload_id, CompleteRequest(part_ids=part_ids, **digests))
    assert done.status == "completed"
    assert done.file is not None
    return stores.files.path_of(done.file.id).read_bytes()


def test_parts_out_of_order_and_one_repeated(stores: ApiStores) -> None:
    upload = stores.open(DATA)
    order = [3, 1, 0, 9, 2, 8, 4, 6, 5, 7]
    stores.send(upload.id, b"a first, wrong try", number=4)
    for number in order:
        stores.send(upload.id, PIECES[number], number=number)
    parts = stores.uploads.parts(upload.id, after=None, limit=100).data
    assert [part.number for part in parts] == list(range(10))
    assert [part.sha256 for part in parts] == [sha256(piece) for piece in PIECES]
    ids = [part.id for part in parts]
    assert (
        complete(stores, upload.id, *ids, md5=hashlib.md5(DATA, usedforsecurity=False).hexdigest(), sha256=sha256(DATA))
        == DATA
    )
    assert not stores.layout.upload(upload.id).exists()
    assert stores.temporary_files() == []


def test_the_order_of_part_ids_decides_not_the_order_of_arrival(stores: ApiStores) -> None:
    upload = stores.open(b"abcdef")
    last, first = stores.send(upload.id, b"def"), stores.send(upload.id, b"abc")
    assert (last.number, first.number) == (1, 2)
    assert complete(stores, upload.id, first.id, last.id) == b"abcdef"


def test_parts_in_parallel(stores: ApiStores) -> None:
    upload = stores.open(DATA)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda piece: stores.send(upload.id, piece), PIECES))
    assert sorted(part.number for part in parts) == list(range(1, 11))
    assert complete(stores, upload.id, *(part.id for part in parts)) == DATA


def test_resume_after_a_restart(stores: ApiStores) -> None:
    upload = stores.open(DATA)
    for number in (0, 1, 5):
        stores.send(upload.id, PIECES[number], number=number)
    stores.engine.dispose()
    again = ApiStores(stores.settings, stores.clock)
    again.uploads.sweep()
    arrived = {part.number: part for part in again.uploads.parts(upload.id, after=None, limit=100).data}
    assert sorted(arrived) == [0, 1, 5]
    for number in set(range(10)) - set(arrived):
        arrived[number] = again.send(upload.id, PIECES[number], number=number)
    assert complete(again, upload.id, *(arrived[number].id for number in range(10))) == DATA


def test_a_wrong_digest_changes_nothing_and_can_be_mended(stores: ApiStores) -> None:
    upload = stores.open(b"abcdef", sha256=sha256(b"abcdef"))
    good, bad = stores.send(upload.id, b"abc", number=0), stores.send(upload.id, b"deX", number=1)
    with pytest.raises(InvalidRequest, match=sha256(b"abcdeX")) as caught:
        stores.uploads.complete(upload.id, CompleteRequest(part_ids=(good.id, bad.id)))
    assert (caught.value.code, caught.value.param) == ("digest_mismatch", "sha256")
    with pytest.raises(InvalidRequest, match="md5 of the 6 bytes") as caught:
        stores.uploads.complete(upload.id, CompleteRequest(part_ids=(good.id, bad.id), md5="0" * 32))
    assert caught.value.param == "md5"
    assert stores.uploads.get(upload.id).status == "pending"
    assert stores.files.find(sha256(b"abcdeX")) is None
    mended = stores.send(upload.id, b"def", number=1)
    assert complete(stores, upload.id, good.id, mended.id) == b"abcdef"


def test_a_wrong_size_names_both_numbers(stores: ApiStores) -> None:
    upload = stores.open(b"123456")
    part = stores.send(upload.id, b"123")
    with pytest.raises(InvalidRequest, match="hold 3 bytes, the upload declared 6") as caught:
        stores.uploads.complete(upload.id, CompleteRequest(part_ids=(part.id,)))
    assert caught.value.code == "upload_size_mismatch"


def test_unknown_and_doubled_parts(stores: ApiStores) -> None:
    upload, other = stores.open(b"123456"), stores.open(b"123")
    part, foreign = stores.send(upload.id, b"123"), stores.send(other.id, b"456")
    with pytest.raises(InvalidRequest, match=foreign.id) as caught:
        stores.uploads.complete(upload.id, CompleteRequest(part_ids=(part.id, foreign.id)))
    assert (caught.value.code, caught.value.param) == ("unknown_part", "part_ids.1")
    with pytest.raises(InvalidRequest) as caught:
        stores.uploads.complete(upload.id, CompleteRequest(part_ids=(part.id, part.id)))
    assert caught.value.code == "duplicate_part"


def test_completing_twice_answers_like_the_first_time(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    part = stores.send(upload.id, b"abc")
    request = CompleteRequest(part_ids=(part.id,))
    assert stores.uploads.complete(upload.id, request) == stores.uploads.complete(upload.id, request)
    assert len(stores.files.list(after=None, limit=9).data) == 1


def test_completing_at_once_makes_one_file(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    request = CompleteRequest(part_ids=(stores.send(upload.id, b"abc").id,))
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: stores.uploads.complete(upload.id, request), range(4)))
    assert len({answer.file.id for answer in done if answer.file}) == 1


def test_an_empty_file(stores: ApiStores) -> None:
    upload = stores.open(b"")
    assert complete(stores, upload.id, sha256=sha256(b"")) == b""


def test_stored_bytes_need_no_parts(stores: ApiStores) -> None:
    stores.put(DATA)
    upload = stores.open(DATA, sha256=sha256(DATA))
    assert complete(stores, upload.id) == DATA


def test_the_total_limit_is_named(stores: ApiStores) -> None:
    with pytest.raises(TooLarge, match="bytes 5001 exceeds the 5000 bytes") as caught:
        stores.open(b"", bytes=5001)
    assert (caught.value.code, caught.value.param) == ("upload_too_large", "bytes")


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    stores = ApiStores(Settings(home=tmp_path, max_upload_bytes=2**53))
    with pytest.raises(TooLarge, match="bytes free") as caught:
        stores.open(b"", bytes=shutil.disk_usage(tmp_path).total + 1)
    assert (caught.value.code, caught.value.param, caught.value.status) == ("disk_full", "bytes", 413)


def test_a_part_that_is_too_large(stores: ApiStores) -> None:
    upload = stores.open(DATA)
    with pytest.raises(TooLarge, match="200 bytes") as caught:
        stores.send(upload.id, bytes(201))
    assert caught.value.code == "part_too_large"
    assert stores.temporary_files() == []
    assert stores.uploads.parts(upload.id, after=None, limit=9).data == []


def test_endless_parts_are_refused(stores: ApiStores) -> None:
    upload = stores.open(bytes(100))
    for _ in range(4):  # twice the declared bytes, and one largest part
        stores.send(upload.id, bytes(100))
    with pytest.raises(InvalidRequest, match="over twice the 100 bytes") as caught:
        stores.send(upload.id, bytes(100))
    assert caught.value.code == "upload_size_exceeded"
    assert stores.temporary_files() == []


def test_cancel_frees_the_parts(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    part = stores.send(upload.id, b"abc")
    assert stores.uploads.cancel(upload.id).status == "cancelled"
    assert stores.uploads.cancel(upload.id).status == "cancelled"
    assert not stores.layout.upload(upload.id).exists()
    for act in (
        lambda: stores.send(upload.id, b"abc"),
        lambda: stores.uploads.complete(upload.id, CompleteRequest(part_ids=(part.id,))),
    ):
        with pytest.raises(Conflict, match="is cancelled") as caught:
            act()
        assert caught.value.code == "upload_not_pending"


def test_a_completed_upload_cannot_be_cancelled(stores: ApiStores) -> None:
    upload = stores.open(b"")
    complete(stores, upload.id)
    with pytest.raises(Conflict, match="is completed"):
        stores.uploads.cancel(upload.id)


def test_an_upload_expires(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    stores.send(upload.id, b"abc")
    stores.clock.now += 61
    assert stores.uploads.get(upload.id).status == "expired"
    with pytest.raises(Conflict, match="expired at") as caught:
        stores.send(upload.id, b"abc")
    assert caught.value.code == "upload_expired"
    stores.open(b"another")
    assert not stores.layout.upload(upload.id).exists()
    assert stores.uploads.get(upload.id).status == "expired"


def test_cancelled_while_a_part_is_under_way(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    with stores.uploads.land(upload.id) as landing:
        landing.write(b"abc")
        landed = landing.finish()
    stores.uploads.cancel(upload.id)
    with pytest.raises(Conflict):
        stores.uploads.add_part(upload.id, landed, 0)
    assert stores.temporary_files() == []


def test_the_sweep_removes_folders_without_an_upload(stores: ApiStores) -> None:
    upload = stores.open(b"abc")
    stores.send(upload.id, b"abc")
    stray = stores.layout.upload("upload_gone")
    stray.mkdir()
    stores.uploads.sweep()
    assert not stray.exists()
    assert stores.layout.upload(upload.id).exists()


def test_parts_page_by_number(stores: ApiStores) -> None:
    upload = stores.open(DATA)
    for number in (2, 0, 1):
        stores.send(upload.id, PIECES[number], number=number)
    first = stores.uploads.parts(upload.id, after=None, limit=2)
    second = stores.uploads.parts(upload.id, after=first.last_id, limit=2)
    assert [part.number for part in (*first.data, *second.data)] == [0, 1, 2]
    assert (first.has_more, second.has_more) == (True, False)


@pytest.mark.parametrize("hostile", ["upload_\0", "../..", "", "upload_none"])
def test_hostile_ids_are_not_found(stores: ApiStores, hostile: str) -> None:
    acts = (
        lambda: stores.uploads.get(hostile),
        lambda: stores.uploads.land(hostile),
        lambda: stores.uploads.cancel(hostile),
        lambda: stores.uploads.complete(hostile, CompleteRequest(part_ids=())),
        lambda: stores.uploads.parts(hostile, after=None, limit=1),
    )
    for act in acts:
        with pytest.raises(NotFound):
            act()
    upload = stores.open(b"abc")
    with pytest.raises(ModepressError) as caught:
        stores.uploads.parts(upload.id, after=hostile, limit=1)
    assert caught.value.param == "after"
