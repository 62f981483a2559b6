"""Registering models: checked at the door, whole or not at all, immutable, deletable when nobody needs them."""

import json
import threading
from pathlib import Path

import pytest

from api_schemas.errors import (
    Conflict,
    InvalidCheckpoint,
    InvalidRequest,
    ModepressError,
    NotFound,
    NotPermitted,
    Unavailable,
)
from api_schemas.jobs import JobRequest
from api_schemas.models import ModelRequest
from job_store.database import writing
from job_store.jobs import JobStore
from job_store.settings import Settings
from job_store.tables import ModelRow
from tests.job_store.api_stores import ApiStores
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def stores(tmp_path: Path, tiny: Path) -> ApiStores:
    return ApiStores(Settings(home=tmp_path / "home", model_roots=str(tiny.parent), hub_offline=True))


def pushed(stores: ApiStores, folder: Path, name: str = "tiny", **replaced: bytes) -> ModelRequest:
    """Store a folder's files, some replaced, and return the request that registers them."""
    contents = {file.name: file.read_bytes() for file in folder.iterdir()} | replaced
    files = [{"file_id": stores.put(data, path).id, "path": path} for path, data in contents.items()]
    return ModelRequest.model_validate({"name": name, "files": files})


def leftovers(stores: ApiStores) -> list[str]:
    return [path.name for folder in ("tmp", "models") for path in (stores.layout.home / folder).glob("[!.]*")]


def test_a_model_from_uploaded_files(stores: ApiStores, tiny: Path) -> None:
    model = stores.models.register(pushed(stores, tiny))
    assert (model.status, model.origin, model.parent) == ("ready", "upload", None)
    assert model.facts is not None
    assert model.facts.family == "llama"
    assert model.capabilities["tasks"] == ["completion", "chat", "compression"]
    folder = stores.models.path_of("tiny")
    assert folder == stores.layout.model("tiny")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in tiny.iterdir()
    }
    assert stores.models.get("tiny") == model
    assert stores.models.list(after=None, limit=9).data == [model]


def test_a_model_keeps_its_bytes_when_its_files_are_deleted(stores: ApiStores, tiny: Path) -> None:
    request = pushed(stores, tiny)
    stores.models.register(request)
    for file in request.files or ():
        stores.files.delete(file.file_id)
    assert (stores.models.path_of("tiny") / "model.safetensors").read_bytes() == (
        tiny / "model.safetensors"
    ).read_bytes()


def test_a_model_by_path_is_referenced_and_never_deleted(stores: ApiStores, tiny: Path) -> None:
    model = stores.models.register(ModelRequest(name="here", path=str(tiny)))
    assert model.origin == "path"
    assert stores.models.path_of("here") == tiny
    stores.models.delete("here")
    assert (tiny / "config.json").exists()
    with pytest.raises(NotPermitted):
        stores.models.register(ModelRequest(name="there", path="/etc"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b"\xff" * 100),
        ("config.json", b"{"),
        ("config.json", json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}).encode()),
        ("pytorch_model.bin", b"\x80\x04\x95"),
    ],
    ids=["truncated", "not JSON", "remote code", "pickle"],
)
def test_a_bad_checkpoint_leaves_nothing(stores: ApiStores, tiny: Path, name: str, data: bytes) -> None:
    with pytest.raises(InvalidCheckpoint):
        stores.models.register(pushed(stores, tiny, **{name: data}))
    assert leftovers(stores) == []
    with pytest.raises(NotFound):
        stores.models.get("tiny")
    stores.models.register(pushed(stores, tiny))


def test_hostile_names_leave_nothing(stores: ApiStores, tiny: Path) -> None:
    request = pushed(stores, tiny)
    assert request.files is not None
    for path in ("../../evil", "/srv/evil", "config.json"):
        hostile = ModelRequest.model_validate(
            {"name": "evil", "files": [*request.files, {"file_id": request.files[0].file_id, "path": path}]}
        )
        with pytest.raises(InvalidRequest):
            stores.models.register(hostile)
    assert leftovers(stores) == []


def test_an_unknown_file_is_named(stores: ApiStores) -> None:
    request = ModelRequest.model_validate({"name": "m", "files": [{"file_id": "file-none", "path": "config.json"}]})
    with pytest.raises(NotFound, match="file-none") as caught:
        stores.models.register(request)
    assert caught.value.param == "files.0.file_id"
    assert leftovers(stores) == []


def test_a_name_is_taken_once(stores: ApiStores, tiny: Path) -> None:
    request = pushed(stores, tiny)
    outcomes: list[str] = []

    def register() -> None:
        try:
            outcomes.append(stores.models.register(request).status)
        except ModepressError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["model_exists"] * 3 + ["ready"]
    assert leftovers(stores) == ["tiny"]


def test_the_trace_of_a_crash_is_replaced(stores: ApiStores, tiny: Path) -> None:
    stores.layout.model("tiny").mkdir()
    (stores.layout.model("tiny") / "half").write_bytes(b"half")
    stores.models.register(pushed(stores, tiny))
    assert not (stores.models.path_of("tiny") / "half").exists()


def test_a_hub_id_needs_a_network_and_a_broker(stores: ApiStores, tmp_path: Path) -> None:
    request = ModelRequest(name="hub", hub_id="org/model")
    with pytest.raises(InvalidRequest, match="MODEPRESS_HUB_OFFLINE") as caught:
        stores.models.register(request)
    assert (caught.value.code, caught.value.param) == ("hub_offline", "hub_id")
    lonely = ApiStores(Settings(home=tmp_path / "other"))
    with pytest.raises(Unavailable, match="MODEPRESS_BROKER_URL") as unavailable:
        lonely.models.register(request)
    assert unavailable.value.code == "no_broker"


def test_a_download_is_not_ready_and_says_why(tmp_path: Path) -> None:
    broker = f"filesystem://{tmp_path / 'broker'}"
    stores = ApiStores(Settings(home=tmp_path / "home", broker_url=broker))
    model = stores.models.register(ModelRequest(name="hub", hub_id="org/model", revision="main"))
    assert (model.status, model.facts, model.capabilities["tasks"]) == ("downloading", None, [])
    assert len(list((tmp_path / "broker" / "messages").iterdir())) == 1
    with pytest.raises(Conflict, match="downloading: wait") as caught:
        stores.models.path_of("hub")
    assert caught.value.code == "model_not_ready"
    with writing(stores.engine) as session:
        row = session.get_one(ModelRow, "hub")
        row.status, row.error = "failed", {"code": "hub_not_found", "message": "no such repository", "param": None}
    with pytest.raises(Conflict, match="failed: no such repository"):
        stores.models.path_of("hub")
    stores.models.delete("hub")


def test_a_model_that_a_job_reads_stays(stores: ApiStores, tiny: Path) -> None:
    stores.models.register(pushed(stores, tiny))
    jobs = JobStore(stores.engine)
    recipe = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}
    job, _ = jobs.create(JobRequest.model_validate({"model": "tiny", "recipe": recipe}), recipe_hash="0" * 64)
    with pytest.raises(Conflict, match=job.id) as caught:
        stores.models.delete("tiny")
    assert caught.value.code == "model_in_use"
    jobs.request_cancel(job.id)
    stores.models.delete("tiny")
    assert leftovers(stores) == []
    with pytest.raises(NotFound) as missing:
        stores.models.delete("tiny")
    assert missing.value.code == "model_not_found"


def test_models_page_newest_first(stores: ApiStores, tiny: Path) -> None:
    for name in ("a", "b", "c"):
        stores.models.register(ModelRequest(name=name, path=str(tiny)))
        stores.clock.now += 1
    first = stores.models.list(after=None, limit=2)
    second = stores.models.list(after=first.last_id, limit=2)
    assert [model.id for model in (*first.data, *second.data)] == ["c", "b", "a"]
    assert (first.has_more, second.has_more) == (True, False)


def test_two_origins_or_none_are_refused() -> None:
    for values in ({}, {"path": "/x", "hub_id": "a/b"}):
        with pytest.raises(ValueError, match="exactly one"):
            ModelRequest.model_validate({"name": "m", **values})
