"""Registered models: checked at the door, immutable afterwards, each knowing where it came from."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, and_, or_, select
from sqlalchemy.orm import Session

from api_schemas.errors import Conflict, InvalidRequest, NotFound
from api_schemas.imports import ImportRequest
from api_schemas.jobs import TERMINAL
from api_schemas.listing import Page
from api_schemas.models import CheckpointFacts, Model, ModelFile, ModelRequest
from api_schemas.relative_paths import check_relative_paths
from job_store.database import reading, writing
from job_store.files import FileStore
from job_store.landing import disk_errors, exclusive
from job_store.layout import Layout, remove_tree, sync_folder, sync_tree
from job_store.model_paths import resolve_original_under_roots, resolve_under_roots
from job_store.owners import SERVER, Viewer
from job_store.quotas import admit_bytes
from job_store.sending import require_broker, send
from job_store.settings import Settings
from job_store.tables import JobRow, ModelRow
from preflight.checkpoint import describe, open_checkpoint
from preflight.vision import searches_answers

NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


class ModelStore:
    """Registers, finds and deletes models that a viewer may see. A name is taken for all, whoever has it.

    A folder under models/ is built elsewhere and renamed into place, so nobody sees half a model. Artifacts stand on
    their own: a parent may be deleted, its children go on naming it.
    """

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        settings: Settings,
        *,
        files: FileStore | None = None,
        clock: Callable[[], float] = time.time,
        viewer: Viewer = SERVER,
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._settings = settings
        self._files = files or FileStore(engine, layout, clock=clock, viewer=viewer)
        self._clock = clock
        self._viewer = viewer

    def register(self, request: ModelRequest) -> Model:
        """Check a checkpoint and record it under the name asked for.

        Raises:
            Conflict: `model_exists`.
            InvalidCheckpoint: what is wrong with it.
            InvalidRequest: `unsafe_path`, `duplicate_path`, `path_not_found`, `hub_offline`.
            NotPermitted: `path_not_allowed`, `byte_quota_exceeded`.
            NotFound: a file id that does not exist.
            Unavailable: a hub id or originals, and no broker is configured through which a worker could be asked.
        """
        self._refuse_taken(request.name)
        if request.files is not None:
            return self._from_files(request, request.files)
        if request.path is not None:
            folder = resolve_under_roots(request.path, self._settings.roots)
            with self._locked(request.name):
                return self._insert(request, "path", folder, describe(open_checkpoint(folder)))
        if request.originals is not None:
            return self._from_originals(request, request.originals)
        return self._from_hub(request)

    def get(self, model_id: str) -> Model:
        """Return a model. Raises NotFound."""
        with reading(self._engine) as session:
            return _to_model(self._row(session, model_id))

    def list(self, *, after: str | None, limit: int) -> Page[Model]:
        """Return models, newest first. Raises NotFound when `after` names none."""
        statement = self._viewer.only(select(ModelRow), ModelRow.owned_by)
        statement = statement.order_by(ModelRow.created_at.desc(), ModelRow.id.desc()).limit(limit + 1)
        with reading(self._engine) as session:
            if after is not None:
                last = self._row(session, after, "after")
                older = and_(ModelRow.created_at == last.created_at, ModelRow.id < last.id)
                statement = statement.where(or_(ModelRow.created_at < last.created_at, older))
            found = [_to_model(row) for row in session.scalars(statement)]
        data = found[:limit]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return Page[Model](data=data, has_more=len(found) > limit, first_id=ends[0], last_id=ends[1])

    def path_of(self, model_id: str) -> Path:
        """Return the folder of a model that is ready. Raises NotFound, or Conflict `model_not_ready`."""
        with reading(self._engine) as session:
            row = self._row(session, model_id)
            if row.status != "ready":
                reason = (row.error or {}).get("message", "wait until its status is 'ready'")
                message = f"model {model_id!r} is {row.status}: {reason}"
                raise Conflict("model_not_ready", message, "model")
            return Path(row.path)

    def delete(self, model_id: str) -> None:
        """Forget a model and remove its folder, unless it was registered by path: that folder is the user's.

        Raises NotFound, or Conflict `model_in_use` while a job that has not ended reads it.
        """
        with self._locked(model_id):
            with writing(self._engine) as session:
                row = self._row(session, model_id)
                _refuse_in_use(session, model_id)
                session.delete(row)
            if row.origin != "path":
                self._remove(model_id)

    def _from_files(self, request: ModelRequest, files: tuple[ModelFile, ...]) -> Model:
        check_relative_paths([file.path for file in files])
        scratch = self._layout.scratch("model")
        try:
            with disk_errors("the model"):
                for index, file in enumerate(files):
                    self._place(file, scratch, index)
                sync_tree(scratch)
            facts = describe(open_checkpoint(scratch))
            with self._locked(request.name):
                self._refuse_taken(request.name)
                target = self._layout.model(request.name)
                self._remove(request.name)  # no row names it, so it is the trace of a crash
                scratch.rename(target)
                sync_folder(target.parent)
                return self._insert(request, "upload", target, facts)
        finally:
            remove_tree(scratch)

    def _place(self, file: ModelFile, folder: Path, index: int) -> None:
        blob = self._files.path_of(file.file_id, param=f"files.{index}.file_id")
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(blob, target)
        except FileNotFoundError as error:  # deleted between the two lines above
            message = f"file {file.file_id!r} was deleted meanwhile; upload it again"
            raise NotFound("file_not_found", message, f"files.{index}.file_id") from error
        except OSError as error:
            if error.errno not in NO_HARD_LINK:
                raise
            shutil.copyfile(blob, target)

    def _from_hub(self, request: ModelRequest) -> Model:
        if self._settings.hub_offline:
            message = (
                f"hub_id {request.hub_id!r} cannot be downloaded: this server is offline (MODEPRESS_HUB_OFFLINE); "
                "upload the files or register a server-side path"
            )
            raise InvalidRequest("hub_offline", message, "hub_id")
        require_broker(self._settings)
        with self._locked(request.name):
            model = self._insert(request, "hub", self._layout.model(request.name), None)
        send(model.id, "fetch_model", self._settings)
        return model

    def _from_originals(self, request: ModelRequest, originals: ImportRequest) -> Model:
        roots = self._settings.roots
        places = {
            role: str(resolve_original_under_roots(path, roots, f"originals.{role}"))
            for role, path in originals.places().items()
        }
        require_broker(self._settings)
        resolved = request.model_copy(update={"originals": originals.model_copy(update=places)})
        with self._locked(request.name):
            model = self._insert(resolved, "import", self._layout.model(request.name), None)
        send(model.id, "fetch_model", self._settings)
        return model

    def _insert(self, request: ModelRequest, origin: str, folder: Path, facts: CheckpointFacts | None) -> Model:
        row = ModelRow(
            id=request.name,
            created_at=self._clock(),
            status="downloading" if facts is None else "ready",
            origin=origin,
            path=str(folder),
            parent=None,
            job=None,
            facts=None if facts is None else facts.model_dump(mode="json"),
            error=None,
            request=request.model_dump(mode="json"),
            owned_by=self._viewer.owner,
        )
        with writing(self._engine) as session:
            if session.get(ModelRow, request.name) is not None:
                raise _taken(request.name)
            if facts is None:  # nobody knows yet how large it is: it must not be full already
                admit_bytes(session, self._viewer, 1, "hub_id" if origin == "hub" else "originals")
            session.add(row)
        return _to_model(row)

    def _row(self, session: Session, model_id: str, param: str = "model") -> ModelRow:
        row = None if "\0" in model_id else session.get(ModelRow, model_id)
        if row is None or not self._viewer.sees(row.owned_by):
            message = f"no model has id {model_id!r}; GET /v1/models lists those there are"
            raise NotFound("model_not_found", message, param)
        return row

    def _refuse_taken(self, name: str) -> None:
        with reading(self._engine) as session:
            if session.get(ModelRow, name) is not None:
                raise _taken(name)

    def _remove(self, model_id: str) -> None:
        folder = self._layout.model(model_id)
        if folder.exists():
            trash = self._layout.scratch("trash")
            folder.rename(trash)  # gone at once, though removing may take long or be cut short
            remove_tree(trash)

    def _locked(self, model_id: str) -> AbstractContextManager[None]:
        return exclusive(self._layout.home / "models" / f".{sum(model_id.encode()) % 256:02x}.lock")


def _taken(name: str) -> Conflict:
    return Conflict("model_exists", f"name {name!r} is taken; models are immutable: choose another name", "name")


def _refuse_in_use(session: Session, model_id: str) -> None:
    statement = select(JobRow).where(JobRow.model == model_id, JobRow.status.not_in(TERMINAL)).limit(1)
    job = session.scalars(statement).one_or_none()
    if job is not None:
        message = f"model {model_id!r} is read by job {job.id!r} ({job.status}); cancel the job or wait for its end"
        raise Conflict("model_in_use", message, "model")


def _to_model(row: ModelRow) -> Model:
    values: dict[str, Any] = {
        "id": row.id,
        "created": int(row.created_at),
        "owned_by": row.owned_by,
        "status": row.status,
        "origin": row.origin,
        "parent": row.parent,
        "job": row.job,
        "facts": row.facts,
        "error": row.error,
        "capabilities": _capabilities(row),
    }
    return Model.model_validate(values)


def _capabilities(row: ModelRow) -> dict[str, list[str]]:
    tasks = []
    if row.status == "ready":
        tasks = ["completion", "chat"] if (row.facts or {}).get("has_chat_template") else ["completion"]
        if searches_answers(row.facts or {}):
            tasks.remove("completion")
        if (row.facts or {}).get("family") is not None and not (row.facts or {}).get("blockers"):
            tasks.append("compression")
    facts = row.facts or {}
    more = [kind for kind in ("image", "table") if "chat" in tasks and facts.get(f"reads_{kind}s")]
    engines = list(facts.get("engines", ["transformers"])) if tasks else []
    return {"input_modalities": ["text", *more], "output_modalities": ["text"], "tasks": tasks, "engines": engines}
