"""`modepress.Client`: everything the command line does, from Python.

    with modepress.Client("http://127.0.0.1:8000") as client:
        model = client.push("SmolLM2-135M-Instruct")
        job = client.compress(model.id, {"steps": [{"method": "modegpt", "sparsity": 0.2}]})
        for event in client.events(job.id, follow=True):
            print(event.message)
        print(client.report(job.id).perplexity)

Every verb raises `ModepressApiError` when the server refuses or fails, `Unreachable` when none answers.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from api_schemas.errors import Conflict
from api_schemas.events import JobEvent
from api_schemas.files import FileObject, Purpose
from api_schemas.jobs import TERMINAL, Job, JobRequest
from api_schemas.listing import Page
from api_schemas.models import Deleted, Model, ModelFile, ModelFileObject, ModelRequest
from api_schemas.plans import Plan, PlanRequest
from api_schemas.recipe import Recipe
from api_schemas.reports import CompressionReport
from modepress import chatting, downloads, event_stream, model_folder, uploads
from modepress.api_error import ModepressApiError, Unreachable
from modepress.chatting import ChatAnswer, ChatPiece, Files, Messages
from modepress.connection import Connection
from modepress.downloads import PulledFile
from modepress.observing import Observing

DEFAULT_URL = "http://127.0.0.1:8000"
PAGE = 100
RECONNECTS = 10
POLL_SECONDS = 1.0

RecipeLike = Recipe | Mapping[str, Any]
OnProgress = Callable[[str, int], None]


class Client(Observing):
    """A Modepress server's verbs.

    Args:
        url: address of the server; default `MODEPRESS_URL`, else http://127.0.0.1:8000.
        api_key: default `MODEPRESS_API_KEY`; a server on loopback may need none.
        timeout: seconds until an answer must have begun or gone on.
        journal: folder that remembers unfinished uploads; default `$MODEPRESS_HOME/pushes` or `./.modepress/pushes`.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        journal: Path | None = None,
    ) -> None:
        key = api_key or os.environ.get("MODEPRESS_API_KEY")
        self._connection = Connection(url or os.environ.get("MODEPRESS_URL", DEFAULT_URL), key, timeout=timeout)
        home = Path(os.environ.get("MODEPRESS_HOME", ".modepress"))
        self._journal = uploads.Journal(journal or home / "pushes")

    @property
    def url(self) -> str:
        """Where this client sends its requests."""
        return self._connection.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets."""
        self._connection.close()

    def push(self, folder: str | Path, *, name: str | None = None, on_progress: OnProgress | None = None) -> Model:
        """Upload a model folder and register it.

        Files the server already has (by SHA-256) are not sent; an interrupted push goes on where it stopped.
        Pickles and weights in other formats stay at home: `modepress.model_folder.look_into` lists them.

        Args:
            name: id of the model; default: the folder's name.
            on_progress: called with a file's name and the bytes that are now safe on the server, piece by piece.

        Raises:
            InvalidRequest: the folder is missing or holds no safetensors file.
            Conflict: the server has a model of this name already; nothing was sent.
        """
        root = Path(folder).expanduser().resolve()
        wanted = name or root.name
        contents = model_folder.look_into(root)
        self._require_free(wanted)
        told: OnProgress = on_progress or (lambda _name, _bytes: None)
        files = list[ModelFile]()
        for file in contents.files:
            file_id = self._ensure_stored(file.path, file.name, "model", partial(told, file.name))
            files.append(ModelFile(file_id=file_id, path=file.name))
        return self.register(ModelRequest(name=wanted, files=tuple(files)))

    def _require_free(self, name: str) -> None:
        """Say before an upload of hours, not after it, that the name is taken."""
        try:
            self.model(name)
        except ModepressApiError as error:
            if error.status != 404:
                raise
        else:
            raise Conflict("model_exists", f"name {name!r} is taken; models are immutable: choose another name", "name")

    def upload(self, path: str | Path, *, purpose: Purpose = "calibration") -> str:
        """Upload one file, unless the server has it, and return its id."""
        local = Path(path).expanduser()
        return self._ensure_stored(local, local.name, purpose, lambda _: None)

    def _ensure_stored(self, path: Path, name: str, purpose: Purpose, on_bytes: Callable[[int], None]) -> str:
        sha256 = model_folder.sha256_of(path)
        stored = uploads.stored_file(self._connection, sha256)
        if stored is not None:
            on_bytes(path.stat().st_size)
            return stored
        sent: FileObject = uploads.send_file(
            self._connection, path, sha256, name=name, purpose=purpose, journal=self._journal, on_bytes=on_bytes
        )
        return sent.id

    def register(self, request: ModelRequest) -> Model:
        """Register a model from uploaded files, a server-side path or a hub id."""
        return self._connection.call("POST", "/v1/models", Model, body=request)

    def models(self) -> list[Model]:
        """Return every model the server knows."""
        return list(self._pages("/v1/models", Page[Model], {}))

    def model(self, model_id: str) -> Model:
        """Return one model."""
        return self._connection.call("GET", f"/v1/models/{model_id}", Model)

    def files(self, model_id: str, *, counted: bool = False) -> list[ModelFileObject]:
        """Return the files of a model's folder; with `counted` the server counts the digests it does not know yet."""
        asked = {"digests": "all" if counted else "known"}
        return list(self._pages(f"/v1/models/{model_id}/files", Page[ModelFileObject], asked))

    def pull(
        self, model_id: str, into: str | Path, *, only: Sequence[str] = (), on_progress: OnProgress | None = None
    ) -> list[PulledFile]:
        """Download a model's files into a folder, and say what became of each.

        A file appears whole and with the right digest, or not at all. What a broken pull had received stays beside its
        place (`.NAME.….part`), and the next pull goes on there; a file that is there already is not fetched again.

        Args:
            only: what to fetch, any of: `checkpoint`, `gguf`, `vllm`, a file, a folder. Default: everything.
            on_progress: called with a file's name and the bytes that are now here, piece by piece.

        Raises:
            ModepressError: one of those that `modepress.downloads` names, e.g. Conflict `file_differs`.
        """
        files = downloads.chosen(self.files(model_id), only, model_id)
        if any(file.sha256 is None for file in files):
            files = downloads.chosen(self.files(model_id, counted=True), only, model_id)
        told: OnProgress = on_progress or (lambda _name, _bytes: None)
        return downloads.fetch_all(self._connection, model_id, files, Path(into).expanduser(), told)

    def delete(self, model_id: str) -> Deleted:
        """Delete a model and its files."""
        return self._connection.call("DELETE", f"/v1/models/{model_id}", Deleted, repeatable=False)

    def plan(self, model_id: str, recipe: RecipeLike) -> Plan:
        """Say what a recipe would do, without doing it."""
        body = PlanRequest(model=model_id, recipe=Recipe.model_validate(recipe))
        return self._connection.call("POST", "/v1/compression/plans", Plan, body=body, repeatable=True)

    def compress(
        self,
        model_id: str,
        recipe: RecipeLike,
        *,
        suffix: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Submit a job. It is sent with an `Idempotency-Key` (a fresh one unless given), so a retry makes no second."""
        body = JobRequest(
            model=model_id, recipe=Recipe.model_validate(recipe), suffix=suffix, metadata=dict(metadata or {})
        )
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._connection.call("POST", "/v1/compression/jobs", Job, body=body, headers=headers, repeatable=True)

    def jobs(self, *, limit: int | None = None, metadata: Mapping[str, str] | None = None) -> list[Job]:
        """Return jobs, newest first: all of them, or the first `limit`."""
        params = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        found = list[Job]()
        for job in self._pages("/v1/compression/jobs", Page[Job], params):
            if len(found) == limit:
                break
            found.append(job)
        return found

    def job(self, job_id: str) -> Job:
        """Return one job."""
        return self._connection.call("GET", f"/v1/compression/jobs/{job_id}", Job)

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop."""
        return self._connection.call("POST", f"/v1/compression/jobs/{job_id}/cancel", Job)

    def report(self, job_id: str) -> CompressionReport:
        """Return the before/after report of a finished job."""
        return self._connection.call("GET", f"/v1/compression/jobs/{job_id}/report", CompressionReport)

    def wait(self, job_id: str, *, on_event: Callable[[JobEvent], None] | None = None) -> Job:
        """Follow a job to its end and return it; `on_event` hears every event."""
        for event in self.events(job_id, follow=True):
            if on_event is not None:
                on_event(event)
        return self.job(job_id)

    def events(self, job_id: str, *, after: int = 0, follow: bool = False) -> Iterator[JobEvent]:
        """Yield the events with a sequence above `after`; with `follow`, go on until the job has ended.

        A lost stream is taken up again after the last event seen (`Last-Event-ID`); an event comes once, in order.
        """
        path = f"/v1/compression/jobs/{job_id}/events"
        if not follow:
            yield from self._pages(path, Page[JobEvent], {"after": after})
            return
        lost = 0
        while True:
            try:
                for event in self._streamed(path, after):
                    after, lost = event.sequence, 0
                    yield event
            except Unreachable:
                lost += 1
                if lost > RECONNECTS:
                    raise
                time.sleep(POLL_SECONDS)
                continue
            if self.job(job_id).status in TERMINAL:
                # What was written between the stream's end and the look at the job.
                yield from self._pages(path, Page[JobEvent], {"after": after})
                return
            time.sleep(POLL_SECONDS)

    def _streamed(self, path: str, after: int) -> Iterator[JobEvent]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._connection.stream("GET", path, params={"stream": "true"}, headers=headers) as response:
            for sent in event_stream.parse(response.iter_lines()):
                if sent.event == "job.event":
                    event = JobEvent.model_validate_json(sent.data, extra="ignore")
                    if event.sequence > after:
                        after = event.sequence
                        yield event

    def chat(self, model_id: str, messages: Messages | str, *, images: Files = (), **sampling: Any) -> ChatAnswer:
        """Ask a model; a string is one user message, with files as `images`; `sampling` as in `ChatRequest`."""
        body = chatting.request(model_id, messages, {**sampling, "stream": False}, images)
        completion = self._connection.call("POST", "/v1/chat/completions", chatting.Completion, body=body)
        return chatting.answer(model_id, completion)

    def chat_stream(
        self, model_id: str, messages: Messages | str, *, images: Files = (), **sampling: Any
    ) -> Iterator[ChatPiece]:
        """Ask a model as `chat` does, and yield its answer piece by piece.

        Raises:
            ModepressApiError: also when the server fails in the middle of the answer.
        """
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = chatting.request(model_id, messages, {**sampling, **options}, images)
        content = body.model_dump_json(exclude_none=True).encode()
        headers = {"Content-Type": "application/json"}
        with self._connection.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
            for sent in event_stream.parse(response.iter_lines()):
                if sent.data == "[DONE]":
                    return
                yield chatting.piece(sent.data)

    def _pages(self, path: str, page_type: type[Page[Any]], params: Mapping[str, Any]) -> Iterator[Any]:
        asked = {"limit": PAGE, **params}
        while True:
            page = self._connection.call("GET", path, page_type, params=asked)
            yield from page.data
            if not page.has_more:
                return
            asked["after"] = getattr(page.data[-1], "sequence", page.last_id)
