"""From a model's id to its folder, by the table of registered models."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, NotFound, Unavailable
from job_store.database import reading
from job_store.tables import ModelRow


@dataclass(frozen=True)
class ModelSource:
    """Where a registered model lies. `created_at` tells it from a deleted model that had the same id."""

    id: str
    folder: Path
    created_at: float


@dataclass(frozen=True)
class Registry:
    """Reads the table of models.

    Attributes:
        engine: of the database.
        home: the data folder; relative paths in the table are under it.
    """

    engine: Engine
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
