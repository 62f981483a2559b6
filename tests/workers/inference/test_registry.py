"""Looking up models: what is absent, unfinished, or behind a database that does not answer."""

import pytest

from api_schemas.errors import Conflict, NotFound, Unavailable
from job_store.database import make_engine, upgrade, writing
from job_store.tables import ModelRow
from workers.inference.registry import ModelSource, Registry


@pytest.fixture
def database(tmp_path):
    engine = make_engine(f"sqlite:///{tmp_path / 'modepress.db'}")
    yield engine
    engine.dispose()


def add(database, **values):
    with writing(database) as session:
        session.add(ModelRow(created_at=5.0, origin="path", request={}, **values))


def test_paths_are_absolute_or_under_the_data_folder(database, tmp_path):
    upgrade(database)
    add(database, id="inside", status="ready", path="models/inside")
    add(database, id="outside", status="ready", path="/somewhere/else")
    registry = Registry(database, tmp_path)
    assert registry.find("inside") == ModelSource("inside", tmp_path / "models/inside", 5.0)
    assert str(registry.find("outside").folder) == "/somewhere/else"


@pytest.mark.parametrize("name", ["nobody", "", "a\0b", "x" * 10_000, "'; drop table models; --"])
def test_an_unknown_id(database, tmp_path, name):
    upgrade(database)
    with pytest.raises(NotFound) as caught:
        Registry(database, tmp_path).find(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("status", ["downloading", "failed"])
def test_a_model_that_is_not_ready(database, tmp_path, status):
    upgrade(database)
    add(database, id="soon", status=status, path="x")
    with pytest.raises(Conflict, match=status) as caught:
        Registry(database, tmp_path).find("soon")
    assert caught.value.code == "model_not_ready"


def test_a_database_that_does_not_answer(database, tmp_path):
    with pytest.raises(Unavailable) as caught:
        Registry(database, tmp_path).find("any")  # there are no tables
    assert caught.value.code == "database_unavailable"


def test_which_of_some_ids_are_registered_no_more(database, tmp_path):
    upgrade(database)
    add(database, id="here", status="ready", path="x")
    registry = Registry(database, tmp_path)
    assert registry.absent(frozenset({"here", "gone"})) == {"gone"}
    assert registry.absent(frozenset()) == frozenset()
