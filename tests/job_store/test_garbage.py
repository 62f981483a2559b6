"""Garbage collection: a dry run lists exactly what a run removes, and what is needed stays."""

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine

from api_schemas.errors import NotFound
from api_schemas.files import UploadRequest
from api_schemas.webhooks import WebhookRequest
from job_store.audit import AuditLog
from job_store.database import writing
from job_store.files import FileStore
from job_store.garbage import DAY, GRACE_SECONDS, Collector
from job_store.jobs import JobStore
from job_store.layout import Layout
from job_store.settings import Settings
from job_store.tables import ModelRow
from job_store.uploads import UploadStore
from job_store.webhooks import WebhookStore
from tests.job_store.conftest import HASH, job_request


class Later:
    """The real time, and some days."""

    days = 0.0

    def __call__(self) -> float:
        return time.time() + self.days * DAY


class Yard:
    """A data folder with garbage and things that are needed."""

    def __init__(self, engine: Engine, home: Path, **settings: int) -> None:
        self.engine, self.layout, self.clock = engine, Layout(home).prepare(), Later()
        self.settings = Settings(home=home, **settings)
        self.files = FileStore(engine, self.layout, clock=self.clock)
        self.uploads = UploadStore(engine, self.layout, self.settings, self.files, clock=self.clock)
        self.jobs = JobStore(engine, clock=self.clock)
        self.collector = Collector(engine, self.layout, self.settings, clock=self.clock)

    def put(self, data: bytes) -> str:
        with self.files.land(limit=10**6) as landing:
            landing.write(data)
            return self.files.keep(landing.finish(), filename="a", purpose="calibration").id

    def job(self, *, end: bool, file_id: str | None = None) -> str:
        recipe = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}
        if file_id is not None:
            recipe["calibration"] = {"source": "upload", "file_id": file_id}
        job_id = self.jobs.create(job_request(recipe=recipe), recipe_hash=HASH)[0].id
        for folder in (self.layout.blocks(job_id), self.layout.attempt(job_id, 1)):
            folder.mkdir(parents=True)
            (folder / "data").write_bytes(b"x" * 100)
        (self.layout.job(job_id) / "log.txt").write_text("said")
        if end:
            self.jobs.request_cancel(job_id)
        return job_id

    def collect(self) -> set[tuple[str, str, int]]:
        listed = self.collector.collect(dry_run=True)
        before = sorted(self.layout.home.rglob("*"))
        assert self.collector.collect(dry_run=True) == listed
        assert sorted(self.layout.home.rglob("*")) == before
        removed = self.collector.collect(dry_run=False)
        assert self.collector.collect(dry_run=True) == [one for one in listed if one not in removed]
        return {(one.kind, one.what, one.bytes) for one in removed}


def test_remains_of_jobs_go_and_those_of_live_ones_stay(engine: Engine, tmp_path: Path) -> None:
    yard = Yard(engine, tmp_path / "home", keep_job_days=10)
    ended, live = yard.job(end=True), yard.job(end=False)
    assert yard.collect() == {("job remains", ended, 200)}
    assert (yard.layout.blocks(live) / "data").exists()
    assert (yard.layout.job(ended) / "log.txt").exists()
    yard.clock.days = 11
    assert yard.collect() == {("job folder", ended, 4)}
    assert not yard.layout.job(ended).exists()


def test_uploads_that_are_over_go(engine: Engine, tmp_path: Path) -> None:
    yard = Yard(engine, tmp_path / "home")
    request = UploadRequest(filename="a", purpose="model", bytes=3)
    old = yard.uploads.create(request).id
    with yard.uploads.land(old) as landing:
        landing.write(b"abc")
        yard.uploads.add_part(old, landing.finish(), None)
    assert yard.collect() == set()
    yard.clock.days = 8
    assert yard.collect() == {("upload", old, 3)}
    assert yard.uploads.get(old).status == "expired"


def test_strays_of_crashes_go(engine: Engine, tmp_path: Path) -> None:
    yard = Yard(engine, tmp_path / "home")
    kept = yard.put(b"needed")
    stray = yard.layout.blob("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"stray")
    (yard.layout.home / "pushes").mkdir()
    for name in ("tmp/file.old", "pushes/old.json", "tmp/file.new"):
        (yard.layout.home / name).write_bytes(b"12")
    for name in ("tmp/file.old", "pushes/old.json"):
        os.utime(yard.layout.home / name, (1, 1))
    (yard.layout.model("nobody")).mkdir()
    with writing(engine) as session:
        session.add(ModelRow(id="known", created_at=0, status="ready", origin="hub", path="p", request={}))
    yard.layout.model("known").mkdir()
    found = {("blob", "ab" * 32, 5), ("scratch", "file.old", 2), ("push", "old.json", 2)}
    assert yard.collect() == found  # the folder has come a moment ago: its row may be on the way
    yard.clock.days = 2 * GRACE_SECONDS / DAY
    assert yard.collect() == {("model folder", "nobody", 0)}
    assert yard.layout.model("known").exists()
    with yard.files.open(kept).handle as handle:
        assert handle.read() == b"needed"


def test_files_and_artifacts_are_kept_for_so_many_days(engine: Engine, tmp_path: Path) -> None:
    yard = Yard(engine, tmp_path / "home", keep_file_days=30, keep_artifact_days=90)
    idle, read = yard.put(b"idle"), yard.put(b"read!")
    yard.job(end=False, file_id=read)
    folder = yard.layout.model("made")
    folder.mkdir()
    (folder / "w").write_bytes(b"1234567")
    with writing(engine) as session:
        for name, origin in (("made", "job"), ("own", "upload")):
            row = {"created_at": yard.clock(), "status": "ready", "path": str(yard.layout.model(name))}
            session.add(ModelRow(id=name, origin=origin, request={"files": []}, **row))
    assert yard.collect() == set()
    yard.clock.days = 31
    assert yard.collect() == {("file", idle, 4)}
    yard.clock.days = 91
    assert yard.collect() == {("artifact", "made", 7)}
    assert yard.files.get(read).bytes == 5
    with pytest.raises(NotFound):
        yard.files.get(idle)


def test_old_lines_go(engine: Engine, tmp_path: Path) -> None:
    yard = Yard(engine, tmp_path / "home", keep_audit_days=365)
    AuditLog(engine, clock=yard.clock).record("k", "anna", "long ago")
    hooks = WebhookStore(engine, frozenset(), lambda *_: ["93.184.215.14"], clock=yard.clock)
    hook = hooks.create(WebhookRequest(url="https://hooks.example/")).id
    yard.jobs.request_cancel(yard.jobs.create(job_request(), recipe_hash=HASH)[0].id)
    yard.clock.days = 366
    AuditLog(engine, clock=yard.clock).record("k", "anna", "now")
    assert yard.collect() == {("audit lines", "1", 0)}  # the message waits still
    assert len(hooks.deliveries(hook, limit=9).data) == 1
    assert [line.action for line in AuditLog(engine).list(after=None, limit=9).data] == ["now"]
