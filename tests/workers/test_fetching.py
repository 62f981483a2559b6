"""Downloads from a hub: what is wanted, what is refused, and every way in which a hub can fail."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_schemas.models import Model, ModelRequest
from job_store.database import reading, writing
from job_store.models import ModelStore
from job_store.settings import Settings
from job_store.tables import ModelRow
from modepress.ports import port_to_use
from tests.servers import wait_until
from tests.tiny_models import make_tiny_model
from tests.workers.hub import hub_server
from workers.fetching import Fetcher
from workers.workplace import Workplace, open_workplace


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub with the model `us/tiny`, whose folder holds more than a model should."""
    folder = make_tiny_model(tmp_path / "hub" / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with hub_server({"us/tiny": folder}) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield folder


def register(place: Workplace, hub_id: str = "us/tiny", **more: str) -> None:
    request = ModelRequest.model_validate({"name": "fetched", "hub_id": hub_id, **more})
    row = ModelRow(
        id="fetched",
        created_at=0.0,
        status="downloading",
        origin="hub",
        path="",
        request=request.model_dump(mode="json"),
    )
    with writing(place.engine) as session:
        session.add(row)


def model(place: Workplace) -> Model:
    return ModelStore(place.engine, place.layout, place.settings).get("fetched")


def assert_nothing_left(place: Workplace) -> None:
    assert [path.name for path in (place.layout.home / "tmp").iterdir()] == ["fetch-fetched.lock"]


@pytest.mark.usefixtures("hub")
def test_a_model_arrives_without_what_could_run(place: Workplace) -> None:
    register(place)
    Fetcher(place).run("fetched")
    fetched = model(place)
    assert (fetched.status, fetched.error) == ("ready", None)
    assert fetched.facts is not None
    assert fetched.facts.blocks == 2
    names = {path.name for path in place.layout.model("fetched").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling_tiny.py", ".cache"}
    assert_nothing_left(place)
    Fetcher(place, command=(sys.executable, "-c", "raise SystemExit('fetched twice')")).run("fetched")
    assert model(place) == fetched


@pytest.mark.parametrize(
    ("wanted", "code", "param"),
    [
        ({"hub_id": "us/none"}, "hub_model_not_found", "hub_id"),
        ({"revision": "none"}, "hub_revision_not_found", "revision"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_is_named(place: Workplace, wanted: dict[str, str], code: str, param: str) -> None:
    register(place, **wanted)
    Fetcher(place).run("fetched")
    failed = model(place)
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.param) == ("failed", code, param)
    assert not place.layout.model("fetched").exists()
    assert_nothing_left(place)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_does_not_answer_is_named(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port_to_use('127.0.0.1', 0)}")
    register(place)
    Fetcher(place).run("fetched")
    error = model(place).error
    assert error is not None
    assert error.code == "hub_unreachable"


@pytest.mark.parametrize("how", ["setting", "environment"])
@pytest.mark.usefixtures("hub")
def test_an_offline_server_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = open_workplace(settings.model_copy(update={"hub_offline": how == "setting"}))
    register(place)
    Fetcher(place).run("fetched")
    error = model(place).error
    assert error is not None
    assert error.code == "hub_offline"
    place.engine.dispose()


def test_a_corrupt_model_is_refused(place: Workplace, hub: Path) -> None:
    weights = hub / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    register(place)
    Fetcher(place).run("fetched")
    failed = model(place)
    assert failed.error is not None
    assert failed.status == "failed"
    assert "safetensors" in failed.error.message
    assert not place.layout.model("fetched").exists()


@pytest.mark.parametrize(("command", "code"), [("sys.exit(12)", "disk_full"), ("sys.exit(1)", "download_failed")])
def test_a_process_that_fails_is_named(place: Workplace, command: str, code: str) -> None:
    register(place)
    Fetcher(place, command=(sys.executable, "-c", f"import sys; {command}")).run("fetched")
    error = model(place).error
    assert error is not None
    assert error.code == code
    assert_nothing_left(place)


def test_a_stopping_worker_leaves_the_download_to_the_next(place: Workplace) -> None:
    register(place)
    sleep = (sys.executable, "-c", "import time; time.sleep(600)")
    Fetcher(place, command=sleep, stopping=lambda: True).run("fetched")
    assert model(place).status == "downloading"
    assert_nothing_left(place)


def test_a_deleted_model_stops_its_download_and_two_deliveries_download_once(place: Workplace) -> None:
    register(place)
    sleep = (sys.executable, "-c", "import time; time.sleep(600)")
    first = threading.Thread(target=Fetcher(place, command=sleep).run, args=("fetched",))
    first.start()
    wait_until(lambda: list((place.layout.home / "tmp").glob("fetch-*/request.json")), what="the download")
    Fetcher(place, command=(sys.executable, "-c", "raise SystemExit('twice')")).run("fetched")
    with reading(place.engine) as session:
        assert session.get_one(ModelRow, "fetched").status == "downloading"
    with writing(place.engine) as session:
        session.delete(session.get_one(ModelRow, "fetched"))
    first.join(20)
    assert not first.is_alive()
    assert_nothing_left(place)
