"""Published files become a model of the server: in a process of their own, and with the error a user can act on."""

import sys
from pathlib import Path
from typing import get_args

import pytest

from api_schemas.errors import InvalidRequest, NotPermitted
from api_schemas.imports import ImportRequest
from api_schemas.models import Model, ModelRequest
from compression.importers.families import IMPORTERS
from job_store.database import reading
from job_store.models import ModelStore
from job_store.settings import Settings
from job_store.tables import ModelRow
from tests import tiny_mplug2
from tests.compression.importers.tinygptv_originals import write_originals
from workers.fetching import Fetcher
from workers.workplace import Workplace, open_workplace


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Workplace:
    return open_workplace(settings.model_copy(update={"model_roots": str(tmp_path / "originals")}))


def asked(folder: Path, **more: object) -> ModelRequest:
    """Write originals under the allowed root and ask for them."""
    originals = write_originals(folder / "originals")
    paths = {role: str(path) for role, path in originals.paths.items()}
    body = {"family": "tinygptv", **paths, **originals.options, **more}
    return ModelRequest.model_validate({"name": "tgv", "originals": body})


def store(place: Workplace) -> ModelStore:
    return ModelStore(place.engine, place.layout, place.settings)


def model(place: Workplace) -> Model:
    return store(place).get("tgv")


def test_originals_become_a_model(place: Workplace, tmp_path: Path) -> None:
    before = store(place).register(asked(tmp_path))
    assert (before.status, before.origin) == ("downloading", "import")
    Fetcher(place).run("tgv")
    after = model(place)
    assert (after.status, after.error) == ("ready", None)
    assert after.facts is not None
    assert after.facts.reads_images
    assert after.facts.model_type == "tinygptv"
    assert (place.layout.model("tgv") / "import_ledger.json").is_file()
    Fetcher(place, importing=(sys.executable, "-c", "raise SystemExit('imported twice')")).run("tgv")
    assert model(place) == after
    store(place).delete("tgv")
    assert not place.layout.model("tgv").exists()
    assert (tmp_path / "originals" / "eva_vit_g.pth").is_file()


def test_every_family_of_a_request_has_an_importer() -> None:
    families = {get_args(one.model_fields["family"].annotation)[0] for one in get_args(get_args(ImportRequest)[0])}
    assert families == set(IMPORTERS)


def test_a_checkpoint_beside_its_sizes_and_tokenizer_becomes_a_model(place: Workplace, tmp_path: Path) -> None:
    folder = tiny_mplug2.write_original(tmp_path / "originals", tiny_mplug2.random_weights(tiny_mplug2.MPlug2()))
    body = {
        "family": "mplug2",
        "checkpoint": str(folder / "mPLUG2_tiny.pth"),
        "bert_config": str(folder / "config_bert.json"),
        "tokenizer": str(folder / "bert"),
        "task": "caption",
        "frames": 4,
    }
    store(place).register(ModelRequest.model_validate({"name": "tgv", "originals": body}))
    Fetcher(place).run("tgv")
    after = model(place)
    assert (after.status, after.error) == ("ready", None)
    assert after.facts is not None
    assert after.facts.model_type == "modepress_mplug2"


def test_what_is_wrong_with_the_files_reaches_the_user(place: Workplace, tmp_path: Path) -> None:
    request = asked(tmp_path)
    cut = tmp_path / "originals" / "TinyGPT-V_for_Stage3.pth"
    cut.write_bytes(cut.read_bytes()[:5000])
    store(place).register(request)
    Fetcher(place).run("tgv")
    failed = model(place)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("truncated_file", cut.name)


def test_a_process_that_dies_is_said_to_have(place: Workplace, tmp_path: Path) -> None:
    store(place).register(asked(tmp_path))
    Fetcher(place, importing=(sys.executable, "-c", "raise SystemExit(9)")).run("tgv")
    error = model(place).error
    assert error is not None
    assert (error.code, error.param) == ("import_failed", "originals")


def test_paths_stay_under_the_allowed_roots(place: Workplace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.pth"
    elsewhere.write_bytes(b"")
    request = asked(tmp_path, vision=str(elsewhere))
    with pytest.raises(NotPermitted) as refused:
        store(place).register(request)
    assert (refused.value.code, refused.value.param) == ("path_not_allowed", "originals.vision")
    (tmp_path / "originals" / "phi-2" / "link.bin").symlink_to(elsewhere)
    with pytest.raises(NotPermitted) as refused:
        store(place).register(request.model_copy(update={"originals": _with(request, "eva_vit_g.pth", tmp_path)}))
    assert refused.value.param == "originals.language"
    (tmp_path / "originals" / "phi-2" / "link.bin").unlink()
    with pytest.raises(InvalidRequest) as absent:
        store(place).register(request.model_copy(update={"originals": _with(request, "none.pth", tmp_path)}))
    assert (absent.value.code, absent.value.param) == ("path_not_found", "originals.vision")
    with reading(place.engine) as session:
        assert session.get(ModelRow, "tgv") is None


def _with(request: ModelRequest, vision: str, folder: Path) -> object:
    assert request.originals is not None
    return request.originals.model_copy(update={"vision": str(folder / "originals" / vision)})
