"""A model's files: what is listed, which digests are known, and that no path, link or device leads out."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.models import ModelFileObject, ModelRequest
from job_store.database import writing
from job_store.model_files import ModelFileStore, open_inside
from job_store.settings import Settings
from job_store.tables import ModelRow
from tests.job_store.api_stores import ApiStores, sha256
from tests.job_store.test_models import pushed
from tests.tiny_models import make_tiny_model


@pytest.fixture
def stores(tmp_path: Path) -> ApiStores:
    return ApiStores(Settings(home=tmp_path / "home", model_roots=str(tmp_path), hub_offline=True))


@pytest.fixture
def files(stores: ApiStores) -> ModelFileStore:
    return ModelFileStore(stores.engine, stores.models)


@pytest.fixture
def here(stores: ApiStores, tmp_path: Path) -> Path:
    """The folder of model `here`, registered by path."""
    folder = make_tiny_model(tmp_path / "tiny")
    stores.models.register(ModelRequest(name="here", path=str(folder)))
    return folder


def listed(files: ModelFileStore, model: str = "here", **asked: object) -> list[ModelFileObject]:
    return files.list(model, **{"after": None, "limit": 100, "digests": "known", **asked}).data  # type: ignore[arg-type]


def tag_of(files: ModelFileStore, model: str, path: str) -> str:
    opened = files.open(model, path)
    opened.handle.close()
    return opened.tag


def artifact(stores: ApiStores) -> Path:
    """The folder of model `made`, with a row as a job leaves it."""
    folder = stores.layout.model("made")
    contents = {
        "config.json": b"{}",
        "exports/model-q8_0.gguf": b"GGUF",
        "exports/self_test.json": b"[]",
        "exports/vllm/config.json": b"{}",
        "model.safetensors": b"weights",
        "serve.json": b'{"layout": "nemotron"}',
    }
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    digests = {name: sha256(data) for name, data in contents.items()}
    (folder / "modepress.json").write_text(json.dumps({"files": digests}))
    row = ModelRow(id="made", created_at=0.0, status="ready", origin="job", path=str(folder), request={})
    with writing(stores.engine) as session:
        session.add(row)
    return folder


def test_an_artifact_lists_what_belongs_to_what_with_the_digests_of_its_manifest(
    stores: ApiStores, files: ModelFileStore
) -> None:
    folder = artifact(stores)
    assert [(file.path, file.belongs_to, file.layout) for file in listed(files, "made")] == [
        ("config.json", "checkpoint", "nemotron"),
        ("exports/model-q8_0.gguf", "gguf", None),
        ("exports/self_test.json", "exports", None),
        ("exports/vllm/config.json", "vllm", None),
        ("model.safetensors", "checkpoint", "nemotron"),
        ("modepress.json", "checkpoint", "nemotron"),
        ("serve.json", "checkpoint", "nemotron"),
    ]
    for file in listed(files, "made"):
        data = (folder / file.path).read_bytes()
        assert (file.bytes, file.sha256) == (len(data), sha256(data))


def test_pages(stores: ApiStores, files: ModelFileStore) -> None:
    artifact(stores)
    every = [file.path for file in listed(files, "made")]
    first = files.list("made", after=None, limit=3, digests="known")
    second = files.list("made", after=first.last_id, limit=3, digests="known")
    third = files.list("made", after=second.last_id, limit=3, digests="known")
    assert [first.has_more, second.has_more, third.has_more] == [True, True, False]
    assert [file.path for page in (first, second, third) for file in page.data] == every
    beyond = files.list("made", after="zzz", limit=3, digests="known")
    assert (beyond.data, beyond.has_more, beyond.last_id) == ([], False, None)


def test_digests_of_uploads_are_known_until_the_files_are_deleted_and_can_be_counted(
    stores: ApiStores, files: ModelFileStore, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "sent")
    request = pushed(stores, folder)
    stores.models.register(request)
    true = {file.name: sha256(file.read_bytes()) for file in folder.iterdir()}
    assert {file.path: file.sha256 for file in listed(files, "tiny")} == true
    assert tag_of(files, "tiny", "config.json") == true["config.json"]
    for file in request.files or ():
        stores.files.delete(file.file_id)
    assert {file.sha256 for file in listed(files, "tiny")} == {None}
    assert {file.path: file.sha256 for file in listed(files, "tiny", digests="all")} == true


def test_a_counted_digest_is_of_the_bytes_that_are_there_now(files: ModelFileStore, here: Path) -> None:
    (here / "notes.txt").write_bytes(b"one")
    before = {file.path: file.sha256 for file in listed(files, digests="all")}
    (here / "notes.txt").write_bytes(b"another")
    after = {file.path: file.sha256 for file in listed(files, digests="all")}
    assert (before.pop("notes.txt"), after.pop("notes.txt")) == (sha256(b"one"), sha256(b"another"))
    assert before == after


def test_links_devices_and_hidden_files_are_not_listed_and_not_opened(
    files: ModelFileStore, here: Path, tmp_path: Path
) -> None:
    before = [file.path for file in listed(files)]
    secret = tmp_path / "outside" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("secret")
    (here / "link.txt").symlink_to(secret)
    (here / "loop").symlink_to("loop")
    (here / "folder").symlink_to(secret.parent)
    (here / "inner").mkdir()
    (here / "inner" / "link.txt").symlink_to(secret)
    (here / ".git").mkdir()
    (here / ".git" / "config").write_text("password")
    (here / ".env").write_text("password")
    (here / "new\nline").write_text("no client could write it")
    os.mkfifo(here / "pipe")
    assert [file.path for file in listed(files)] == before
    for path in ("link.txt", "loop", "folder/secret.txt", "folder", "inner/link.txt"):
        with pytest.raises(InvalidRequest, match="symbolic link") as refused:
            files.open("here", path)
        assert (refused.value.code, refused.value.param) == ("symlink_refused", "path")
    for path in (".git/config", ".env", "pipe", "inner", "none", "config.json/x", "none/x"):
        with pytest.raises(NotFound) as missing:
            files.open("here", path)
        assert (missing.value.code, missing.value.param) == ("model_file_not_found", "path")


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "inner/../../x", "a//b", ".", "..", "", "a\\b", "a\0b", "~"]
)
def test_paths_that_would_leave_the_folder_are_refused_by_name(files: ModelFileStore, here: Path, path: str) -> None:
    (here.parent / "secret").write_text("secret")
    with pytest.raises(InvalidRequest) as refused:
        files.open("here", path)
    assert (refused.value.code, refused.value.param) == ("unsafe_path", "path")


def test_a_folder_swapped_for_a_link_is_not_followed(tmp_path: Path) -> None:
    """The name was harmless when it was checked: what counts is what is opened."""
    (tmp_path / "model").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_text("secret")
    (tmp_path / "model" / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidRequest):
        open_inside(tmp_path / "model", "a/x")


def test_an_open_file_can_be_read_after_its_model_is_deleted(
    stores: ApiStores, files: ModelFileStore, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "sent")
    stores.models.register(pushed(stores, folder))
    opened = files.open("tiny", "model.safetensors")
    stores.models.delete("tiny")
    with opened.handle as handle:
        data = handle.read()
    assert hashlib.sha256(data).hexdigest() == sha256((folder / "model.safetensors").read_bytes())
    assert len(data) == opened.bytes


def test_the_tag_changes_with_the_bytes(files: ModelFileStore, here: Path) -> None:
    tags = set()
    for text in ("one", "three"):
        (here / "notes.txt").write_text(text)
        tags.add(tag_of(files, "here", "notes.txt"))
    assert len(tags) == 2


def test_models_that_are_not_there_or_not_ready(stores: ApiStores, files: ModelFileStore, here: Path) -> None:
    with pytest.raises(NotFound, match="nobody"):
        listed(files, "nobody")
    with writing(stores.engine) as session:
        session.add(ModelRow(id="late", created_at=0.0, status="downloading", origin="hub", path="x", request={}))
    with pytest.raises(Conflict, match="downloading"):
        files.open("late", "config.json")
    here.rename(here.with_name("moved"))
    for call in (lambda: listed(files), lambda: files.open("here", "config.json")):
        with pytest.raises(Conflict) as gone:
            call()
        assert gone.value.code == "model_folder_missing"
