"""Stores over a fresh data folder and a real SQLite, with a clock the test turns."""

import hashlib
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine

from api_schemas.files import FileObject, Upload, UploadPart, UploadRequest
from job_store.database import make_engine, upgrade
from job_store.files import FileStore
from job_store.layout import Layout
from job_store.models import ModelStore
from job_store.settings import Settings
from job_store.uploads import UploadStore


@dataclass
class Clock:
    """A clock that stands still until it is turned."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ApiStores:
    """The stores the API uses, with short ways to fill them."""

    settings: Settings
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.layout = Layout(self.settings.resolved_home).prepare()
        self.engine: Engine = make_engine(self.settings.resolved_database_url)
        upgrade(self.engine)
        weakref.finalize(self, self.engine.dispose)  # Python 3.13 warns of SQLite connections nobody closed
        self.files = FileStore(self.engine, self.layout, clock=self.clock)
        self.uploads = UploadStore(self.engine, self.layout, self.settings, self.files, clock=self.clock)
        self.models = ModelStore(self.engine, self.layout, self.settings, files=self.files, clock=self.clock)

    def put(self, data: bytes, name: str = "file.bin", purpose: str = "model") -> FileObject:
        with self.files.land(limit=10**9) as landing:
            landing.write(data)
            return self.files.keep(landing.finish(), filename=name, purpose=purpose)

    def open(self, data: bytes, **changes: object) -> Upload:
        values = {"filename": "file.bin", "purpose": "model", "bytes": len(data), **changes}
        return self.uploads.create(UploadRequest.model_validate(values))

    def send(self, upload_id: str, data: bytes, number: int | None = None) -> UploadPart:
        with self.uploads.land(upload_id) as landing:
            landing.write(data)
            landed = landing.finish()
        return self.uploads.add_part(upload_id, landed, number)

    def temporary_files(self) -> list[Path]:
        return [path for name in ("tmp", "uploads") for path in (self.layout.home / name).rglob("*.tmp")]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
