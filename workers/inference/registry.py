"""From a model's id to its folder, by the table of registered models."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Engine as DatabaseEngine
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, InvalidRequest, NotFound, Unavailable
from api_schemas.inference import Engine
from job_store.database import reading
from job_store.tables import ModelRow
from preflight.engines import OWN, engines_of


@dataclass(frozen=True)
class ModelSource:
    """Where a registered model lies, and what of it is to answer.

    `created_at` tells it from a deleted model that had the same id.
    """

    id: str
    folder: Path
    created_at: float
    engine: Engine = OWN

    @property
    def key(self) -> tuple[str, str]:
        """Under which it is held in memory: the same model by two engines is there twice."""
        return self.id, self.engine

    def answered_by(self, engine: Engine | None) -> "ModelSource":
        """The same model by another engine; None is its own weights.

        Raises:
            InvalidRequest: `engine_not_found`.
        """
        there = engines_of(self.folder)
        if engine is not None and engine not in there:
            message = (
                f"model '{self.id}' cannot be answered by engine '{engine}'; it has {', '.join(there)}. Export onnx in "
                "the job that makes the model, or leave the field out"
            )
            raise InvalidRequest("engine_not_found", message, "engine")
        return replace(self, engine=engine or OWN)


@dataclass(frozen=True)
class Registry:
    """Reads the table of models.

    Attributes:
        engine: of the database.
        home: the data folder; relative paths in the table are under it.
    """

    engine: DatabaseEngine
    home: Path

    def find(self, model_id: str) -> ModelSource:
        """Return the folder of a model that is ready.

        Raises:
            NotFound: `model_not_found`.
            Conflict: `model_not_ready`, while it is downloaded or when that failed.
            Unavailable: `database_unavailable`.
        """
        with self._session() as session:
            row = None if "\0" in model_id else session.get(ModelRow, model_id)  # PostgreSQL takes no NUL
        if row is None:
            raise NotFound("model_not_found", f"model '{model_id}' does not exist; GET /v1/models lists them", "model")
        if row.status != "ready":
            message = f"model '{model_id}' is {row.status}, not ready; see GET /v1/models/{model_id}"
            raise Conflict("model_not_ready", message, "model")
        return ModelSource(row.id, self.home / row.path, row.created_at)

    def absent(self, model_ids: frozenset[str]) -> frozenset[str]:
        """Return those of the ids that are registered no more.

        Raises:
            Unavailable: `database_unavailable`.
        """
        with self._session() as session:
            found = session.scalars(select(ModelRow.id).where(ModelRow.id.in_(model_ids)))
            return model_ids - frozenset(found)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        try:
            with reading(self.engine) as session:
                yield session
        except OperationalError as error:
            raise Unavailable("database_unavailable", "the database does not answer; try again soon") from error
