"""One delivery of a model's id: download or import it in a child process, register what came. Never imports torch."""

import fcntl
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import update

from api_schemas.errors import ErrorBody
from api_schemas.models import ModelRequest
from job_store.database import reading, writing
from job_store.layout import remove_tree, sync_folder, write_whole
from job_store.tables import ModelRow
from workers.child import ChildProcess
from workers.description import EXIT_DISK_FULL, RESULT, FetchDescription, FetchResult, ImportDescription
from workers.outcome import disk_full
from workers.workplace import Workplace

logger = logging.getLogger(__name__)

FETCH_PROCESS = (sys.executable, "-m", "workers.fetch_model")
IMPORT_PROCESS = (sys.executable, "-m", "workers.import_model")
LOOK_SECONDS = 0.5


class Fetcher:
    """Downloads and imports models for one worker.

    Args:
        place: the worker's side of the shared state.
        command: starts a download process; its folder is added as the last argument.
        importing: starts an import process, likewise.
        stopping: whether the worker has been told to stop.
    """

    def __init__(
        self,
        place: Workplace,
        *,
        command: Sequence[str] = FETCH_PROCESS,
        importing: Sequence[str] = IMPORT_PROCESS,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._place = place
        self._command, self._importing = command, importing
        self._stopping = stopping

    def run(self, model_id: str) -> None:
        """Download a model whose row says `downloading`. Safe to call twice: one machine fetches a model once."""
        with self._alone(model_id) as alone:
            request = self._wanted(model_id) if alone else None
            if request is None or (request.hub_id is None and request.originals is None):
                logger.info("model %s is not to be fetched: done, gone or under way", model_id)
                return
            folder = self._place.layout.scratch(f"fetch-{model_id}")
            try:
                result = self._fetch(request, folder)
                if result is not None:
                    self._register(model_id, folder, result)
            finally:
                remove_tree(folder)

    def _fetch(self, request: ModelRequest, folder: Path) -> FetchResult | None:
        folder.mkdir()
        wanted: FetchDescription | ImportDescription
        if request.originals is not None:
            wanted, command = ImportDescription(originals=request.originals), self._importing
        else:
            offline = self._place.settings.hub_offline
            wanted = FetchDescription(hub_id=request.hub_id or "", revision=request.revision, hub_offline=offline)
            command = self._command
        write_whole(folder / "request.json", wanted.model_dump_json().encode())
        child = ChildProcess([*command, str(folder)], folder / "log.txt", {})
        try:
            while not child.finished():
                child.lines(LOOK_SECONDS)
                if self._stopping() or self._wanted(request.name) is None:
                    child.signal_group(signal.SIGKILL)
                    return None  # the row stays `downloading`, and the reaper sends it to the next worker
        finally:
            returncode = child.close()
        return _read_result(returncode, folder, "originals" if request.originals is not None else "hub_id")

    def _register(self, model_id: str, folder: Path, result: FetchResult) -> None:
        target = self._place.layout.model(model_id)
        error = None if result.error is None else result.error.model_dump(mode="json", exclude={"type"})
        values = {"status": "ready" if error is None else "failed", "facts": result.facts, "error": error}
        unfinished = (ModelRow.id == model_id, ModelRow.status == "downloading")
        with writing(self._place.engine) as session:
            change = update(ModelRow).where(*unfinished).values(path=str(target), **values)
            changed = session.execute(change.returning(ModelRow.id)).scalar_one_or_none()
            if (
                changed is not None and error is None
            ):  # in the transaction: the row is ours until the files are in place
                remove_tree(target)
                (folder / "model").rename(target)
                sync_folder(target.parent)
        logger.info("model %s is %s", model_id, values["status"])

    def _wanted(self, model_id: str) -> ModelRequest | None:
        with reading(self._place.engine) as session:
            row = session.get(ModelRow, model_id)
            return ModelRequest.model_validate(row.request) if row is not None and row.status == "downloading" else None

    @contextmanager
    def _alone(self, model_id: str) -> Iterator[bool]:
        with (self._place.layout.home / "tmp" / f"fetch-{model_id}.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _read_result(returncode: int, folder: Path, param: str) -> FetchResult:
    if returncode == EXIT_DISK_FULL:
        return FetchResult(facts=None, error=disk_full().error)
    try:
        return FetchResult.model_validate_json((folder / RESULT).read_bytes())
    except (FileNotFoundError, ValidationError):
        kind, code = ("download", "download_failed") if param == "hub_id" else ("import", "import_failed")
        message = f"the {kind} process ended with status {returncode}; see the worker's log, then register it again"
        logger.error("%s: %s", message, (folder / "log.txt").read_text(errors="replace")[-2000:])
        return FetchResult(facts=None, error=ErrorBody(message=message, type="server_error", param=param, code=code))
