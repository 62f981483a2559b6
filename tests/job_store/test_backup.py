"""Backup and restore: everything is there again, between SQLite and PostgreSQL, and damage is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.models import ModelRequest
from api_schemas.quotas import Quota
from api_schemas.webhooks import WebhookRequest
from job_store.audit import AuditLog
from job_store.backup import back_up, restore
from job_store.database import make_engine, upgrade
from job_store.files import FileStore
from job_store.jobs import JobStore
from job_store.keys import KeyStore
from job_store.layout import Layout
from job_store.leases import LeaseStore
from job_store.models import ModelStore
from job_store.owners import Viewer
from job_store.quotas import QuotaStore
from job_store.settings import Settings
from job_store.tables import Base
from job_store.webhooks import WebhookStore
from tests.job_store.conftest import HASH, job_request
from tests.tiny_models import make_tiny_model

ANNA = Viewer("anna")


class Server:
    """A data folder with one of everything, and its stores."""

    def __init__(self, engine: Engine, home: Path) -> None:
        self.engine, self.layout = engine, Layout(home).prepare()
        self.settings = Settings(home=home)
        self.files = FileStore(engine, self.layout, viewer=ANNA)
        self.models = ModelStore(engine, self.layout, self.settings, files=self.files, viewer=ANNA)

    def fill(self, tiny: Path) -> None:
        sent = []
        for path in sorted(tiny.iterdir()):
            with self.files.land(limit=10**9) as landing:
                landing.write(path.read_bytes())
                file = self.files.keep(landing.finish(), filename=path.name, purpose="model")
            sent.append({"file_id": file.id, "path": path.name})
        self.models.register(ModelRequest.model_validate({"name": "tiny", "files": sent}))
        self.key = KeyStore(self.engine).create("k", scopes=("read",), owner="anna").secret
        AuditLog(self.engine).record("k", "anna", "did")
        QuotaStore(self.engine, Quota()).set("anna", Quota(jobs=3))
        hooks = WebhookStore(self.engine, frozenset(), lambda *_: ["93.184.215.14"], viewer=ANNA)
        hooks.create(WebhookRequest(url="https://hooks.example/"))
        jobs = JobStore(self.engine, viewer=ANNA)
        self.job = jobs.create(job_request(metadata={"a": "b"}), recipe_hash=HASH, idempotency_key="k")[0].id
        LeaseStore(self.engine, max_attempts=3).claim(self.job, "w", 900.0)
        (self.layout.blocks(self.job)).mkdir(parents=True)
        (self.layout.blocks(self.job) / "0.safetensors").write_bytes(b"x")
        (self.layout.job(self.job) / "log.txt").write_text("said")

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        with self.engine.connect() as connection:
            return {
                table.name: sorted((dict(row) for row in connection.execute(select(table)).mappings()), key=str)
                for table in Base.metadata.sorted_tables
            }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def server(engine: Engine, tmp_path: Path, tiny: Path) -> Server:
    server = Server(engine, tmp_path / "home")
    server.fill(tiny)
    return server


def _empty(tmp_path: Path, name: str = "new") -> Server:
    engine = make_engine(f"sqlite:///{tmp_path / f'{name}.db'}")
    return Server(engine, tmp_path / name)


def test_everything_is_there_again(server: Server, tmp_path: Path, tiny: Path) -> None:
    facts = back_up(server.engine, server.layout, tmp_path / "backup")
    assert facts.files == len(list(tiny.iterdir())) * 2 + 1  # blobs, the model's folder, the log; no blocks
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700
    new = _empty(tmp_path)
    assert restore(new.engine, new.layout, tmp_path / "backup") == facts
    before, after = server.rows(), new.rows()
    [old_job], [job] = before.pop("jobs"), after.pop("jobs")
    changed = {"status": "queued", "owner": None, "lease_until": 0.0, "fence": 2}
    assert job == {**old_job, **changed}
    [old_model], [model] = before.pop("models"), after.pop("models")
    assert model == {**old_model, "path": str(new.layout.model("tiny"))}
    assert after == before
    assert new.models.path_of("tiny").joinpath("config.json").read_bytes() == (tiny / "config.json").read_bytes()
    key = KeyStore(new.engine).recognise(server.key)
    assert key is not None
    assert key.owner == "anna"
    for file in new.files.list(after=None, limit=99).data:
        with new.files.open(file.id).handle as handle:
            assert len(handle.read()) == file.bytes
    assert LeaseStore(new.engine, max_attempts=3).claim(server.job, "v", 90.0) is not None
    AuditLog(new.engine).record("k", "anna", "went on")
    new.engine.dispose()


def test_a_backup_goes_into_the_other_kind_of_database(tmp_path: Path, tiny: Path, postgres_database: str) -> None:
    old = _empty(tmp_path, "old")
    upgrade(old.engine)
    old.fill(tiny)
    back_up(old.engine, old.layout, tmp_path / "backup")
    new = Server(make_engine(postgres_database), tmp_path / "new")
    restore(new.engine, new.layout, tmp_path / "backup")
    assert {name: len(rows) for name, rows in new.rows().items()} == {
        name: len(rows) for name, rows in old.rows().items()
    }
    AuditLog(new.engine).record("k", "anna", "went on")  # its number is not one that was brought along
    back_up(new.engine, new.layout, tmp_path / "and back")
    again = _empty(tmp_path, "again")
    restore(again.engine, again.layout, tmp_path / "and back")
    for one in (old, new, again):
        one.engine.dispose()


@pytest.mark.parametrize("what", ["bytes", "gone", "link", "climbs", "format"])
def test_damage_is_refused_before_anything_is_restored(tmp_path: Path, tiny: Path, what: str) -> None:
    old = _empty(tmp_path, "old")
    upgrade(old.engine)
    old.fill(tiny)
    backup = tmp_path / "backup"
    back_up(old.engine, old.layout, backup)
    config = backup / "models" / "tiny" / "config.json"
    if what == "bytes":
        config.write_bytes(config.read_bytes()[::-1])
    elif what == "gone":
        config.unlink()
    elif what == "link":
        config.unlink()
        config.symlink_to(tiny / "config.json")
    elif what == "climbs":
        line = json.dumps({"path": "models/../../escape", "bytes": 1, "sha256": HASH})
        (backup / "files.jsonl").write_text(line + "\n")
    else:
        (backup / "backup.json").write_text((backup / "backup.json").read_text().replace('"format": 1', '"format": 2'))
    new = _empty(tmp_path)
    with pytest.raises(InvalidRequest) as caught:
        restore(new.engine, new.layout, backup)
    assert (caught.value.code, caught.value.param) == (
        "unsafe_path" if what == "climbs" else "backup_damaged",
        "source",
    )
    assert list(new.layout.home.glob("models/*")) == []
    old.engine.dispose()
    new.engine.dispose()


def test_what_is_refused(server: Server, tmp_path: Path) -> None:
    back_up(server.engine, server.layout, tmp_path / "backup")
    with pytest.raises(Conflict) as taken:
        back_up(server.engine, server.layout, tmp_path / "backup")
    assert taken.value.code == "target_exists"
    with pytest.raises(Conflict) as full:
        restore(server.engine, server.layout, tmp_path / "backup")
    assert full.value.code == "not_empty"
    with pytest.raises(NotFound) as nothing:
        restore(server.engine, server.layout, tmp_path)
    assert nothing.value.code == "backup_not_found"
    (blob,) = list(server.layout.home.glob("blobs/*/*"))[:1]
    blob.unlink()
    with pytest.raises(Conflict) as raced:
        back_up(server.engine, server.layout, tmp_path / "second")
    assert raced.value.code == "backup_raced"
    assert sorted(path.name for path in tmp_path.iterdir() if "second" in path.name) == []
