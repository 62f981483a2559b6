"""A job's events as server-sent events: what `/events` lists, told as it happens, from any point on."""

from collections.abc import AsyncIterator

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api_schemas.errors import InvalidRequest
from api_schemas.jobs import TERMINAL
from job_store.jobs import JobStore

POLL_SECONDS = 0.25
KEEP_ALIVE_SECONDS = 15
PAGE = 100


def stream_events(jobs: JobStore, job_id: str, after: int) -> EventSourceResponse:
    """Answer with the events after a sequence number and end with the job. Raises NotFound before the first byte."""
    jobs.get(job_id)
    return EventSourceResponse(_follow(jobs, job_id, after), ping=KEEP_ALIVE_SECONDS, sep="\n")


async def _follow(jobs: JobStore, job_id: str, after: int) -> AsyncIterator[ServerSentEvent]:
    while True:
        # The status is read before the events: once it is terminal, no event can follow those read after it.
        job = await run_in_threadpool(jobs.get, job_id)
        page = await run_in_threadpool(jobs.events, job_id, after=after, limit=PAGE)
        for event in page.data:
            after = event.sequence
            yield ServerSentEvent(event="job.event", id=str(after), data=event.model_dump_json())
        if page.has_more:
            continue
        if job.status in TERMINAL:
            yield ServerSentEvent(event="job.status", data=job.model_dump_json())
            return
        await anyio.sleep(POLL_SECONDS)


def wants_stream(request: Request) -> bool:
    """Whether the caller asked for server-sent events by its Accept header."""
    return "text/event-stream" in request.headers.get("accept", "")


def sequence_of(cursor: str, job_id: str, param: str) -> int:
    """Return the sequence number in a cursor: a bare number, or the id of one of the job's events.

    Raises:
        InvalidRequest: it is neither.
    """
    text = cursor.removeprefix(f"{job_id}-")
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        message = f"{param} {cursor[:120]!r} is neither a sequence number nor the id of an event of job {job_id!r}"
        raise InvalidRequest("invalid_value", message, param)
    return int(text)
