"""`modepress.Client` against a real stack."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_schemas.errors import Conflict, InvalidRequest
from api_schemas.files import Upload, UploadRequest
from modepress import Client, ModepressApiError, Unreachable, chatting, uploads
from modepress.connection import Connection
from modepress.model_folder import sha256_of
from tests.modepress.conftest import PART_BYTES
from tests.modepress.recipes import small_recipe
from tests.modepress.running_stack import RunningStack
from tests.tiny_models import make_tiny_model
from tests.tiny_vision_models import make_tiny_vision_model, picture

pytestmark = pytest.mark.servers


@pytest.fixture
def connection(stack: RunningStack) -> Iterator[Connection]:
    opened = Connection(stack.url, None, timeout=30)
    yield opened
    opened.close()


def bytes_received(url: str) -> int:
    """How many bytes of uploads the server has taken in since it started."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("modepress_upload_bytes_total"))))


def test_push_registers_what_the_folder_holds(client: Client, tiny: str) -> None:
    model = client.model(tiny)
    assert (model.status, model.origin) == ("ready", "upload")
    assert model.facts is not None
    assert model.facts.blocks == 2
    assert model.id in [one.id for one in client.models()]


def test_a_second_push_sends_no_bytes(client: Client, tiny_folder: Path) -> None:
    client.push(tiny_folder, name="tiny-before")  # another test may have collected what none needed any more
    before = bytes_received(client.url)
    heard = dict[str, int]()
    client.push(tiny_folder, name="tiny-again", on_progress=lambda name, sent: heard.update({name: sent}))
    assert bytes_received(client.url) == before
    assert heard["model.safetensors"] == (tiny_folder / "model.safetensors").stat().st_size


def test_a_taken_name_is_refused_before_anything_is_sent(client: Client, tiny: str, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=5)
    before = bytes_received(client.url)
    with pytest.raises(Conflict) as refused:
        client.push(other, name=tiny)
    assert refused.value.code == "model_exists"
    assert bytes_received(client.url) == before


def test_a_broken_upload_goes_on_where_it_stopped(client: Client, connection: Connection, tmp_path: Path) -> None:
    data = bytes(range(256)) * (3 * PART_BYTES // 256) + b"the end"
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    request = UploadRequest(filename="text.txt", purpose="calibration", bytes=len(data), sha256=digest)
    upload = connection.call("POST", "/v1/uploads", Upload, body=request)
    uploads._send_part(connection, upload.id, 1, data[PART_BYTES : 2 * PART_BYTES])
    before = bytes_received(client.url)
    uploads.Journal(tmp_path / "pushes").note(client.url, digest, upload.id)

    file_id = client.upload(path)

    finished = connection.call("GET", f"/v1/uploads/{upload.id}", Upload)
    assert (finished.status, finished.file.id if finished.file else None) == ("completed", file_id)
    assert bytes_received(client.url) == before + len(data) - PART_BYTES, "the part that had arrived stays unsent"
    assert not list((tmp_path / "pushes").glob("*.json")), "the journal forgets a finished upload"


def test_a_journal_of_a_vanished_upload_begins_anew(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "fresh.txt"
    path.write_text("words the server has never seen")
    uploads.Journal(tmp_path / "pushes").note(client.url, sha256_of(path), "upload_that_never_was")
    assert client.upload(path)


def test_chat_with_images(client: Client, tmp_path: Path) -> None:
    model = client.push(make_tiny_vision_model(tmp_path / "seer")).id
    files = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    whole = client.chat(model, "What is this?", images=files, **asked)
    pieces = list(client.chat_stream(model, "What is this?", images=[str(file) for file in files], **asked))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert client.chat(model, "What is this?", images=files[::-1], **asked).text != whole.text
    with pytest.raises(InvalidRequest) as caught:
        client.chat(model, [{"role": "user", "content": "x"}], images=files)
    assert caught.value.code == "images_need_text"


@pytest.mark.parametrize(("field", "value"), [("n", 2), ("logprobs", True)])
def test_what_an_answer_has_no_place_for_is_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chatting.request("m", "Hi", {field: value})
    assert (caught.value.code, caught.value.param) == ("not_read", field)
    assert chatting.request("m", "Hi", {"n": 1, "logprobs": False}).n == 1


def test_a_job_from_plan_to_chat(client: Client, tiny: str) -> None:
    plan = client.plan(tiny, small_recipe())
    assert plan.blockers == ()
    job = client.compress(tiny, small_recipe(), metadata={"who": "test"}, idempotency_key="one-and-only")
    assert client.compress(tiny, small_recipe(), metadata={"who": "test"}, idempotency_key="one-and-only").id == job.id

    seen = [event.sequence for event in client.events(job.id, follow=True)]
    ended = client.job(job.id)
    assert ended.status == "succeeded", ended.error
    assert seen == list(range(seen[0], seen[0] + len(seen))), "events come once each, in order"
    assert [event.sequence for event in client.events(job.id)] == seen
    assert [event.sequence for event in client.events(job.id, after=seen[-2])] == seen[-1:]
    assert job.id in [one.id for one in client.jobs(metadata={"who": "test"})]
    assert client.jobs(metadata={"who": "nobody"}) == []
    assert len(client.jobs(limit=1)) == 1

    report = client.report(job.id)
    assert report.parameters.after == plan.parameters_after
    assert ended.compressed_model is not None
    for model_id in (tiny, ended.compressed_model):
        answer = client.chat(model_id, "What is the capital of France?", max_tokens=6, temperature=0)
        pieces = list(client.chat_stream(model_id, "What is the capital of France?", max_tokens=6, temperature=0))
        assert "".join(piece.text for piece in pieces) == answer.text
        assert answer.usage is not None
        assert pieces[-1].usage == answer.usage


def test_cancel(client: Client, tiny: str) -> None:
    recipe = small_recipe(calibration={"source": "builtin", "sequence_length": 512, "num_samples": 200})
    job = client.compress(tiny, recipe)
    assert client.cancel(job.id).status in {"cancelling", "cancelled"}
    assert client.wait(job.id).status == "cancelled"
    with pytest.raises(ModepressApiError) as refused:
        client.cancel(job.id)
    assert (refused.value.status, refused.value.code) == (409, "job_not_cancellable")


def test_refusals_carry_the_servers_words(client: Client) -> None:
    with pytest.raises(ModepressApiError) as refused:
        client.model("nobody")
    assert refused.value.status == 404
    assert refused.value.code == "model_not_found"
    assert "nobody" in refused.value.message
    assert refused.value.body().type == "not_found_error"


def test_delete(client: Client, tiny_folder: Path) -> None:
    client.push(tiny_folder, name="short-lived")
    assert client.delete("short-lived").deleted
    assert "short-lived" not in [model.id for model in client.models()]


def test_nobody_there() -> None:
    with Client("http://127.0.0.1:9", timeout=5) as nowhere, pytest.raises(Unreachable) as lost:
        nowhere.models()
    assert lost.value.code == "unreachable"
    assert "modepress up" in lost.value.message


def test_an_answer_that_is_no_error_object(stack: RunningStack) -> None:
    with Client(stack.url + "/nowhere") as wrong, pytest.raises(ModepressApiError) as lost:
        wrong.models()
    assert lost.value.status == 404


def test_a_missing_folder(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.push(tmp_path / "nothing")
    assert refused.value.code == "folder_missing"
