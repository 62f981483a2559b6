"""`/v1/compression/jobs`: submit, follow, cancel, read the report."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from api_schemas.events import JobEvent
from api_schemas.jobs import Job, JobRequest
from api_schemas.listing import Page
from api_schemas.reports import CompressionReport
from api_schemas.traces import ChromeTrace
from job_store.traces import chrome_trace
from service.deps import StoresOf
from service.event_stream import sequence_of, stream_events, wants_stream
from service.job_filter import metadata_of
from service.openapi import METADATA_FILTER, REPLAYED, STREAMED
from service.submission import submit

router = APIRouter(prefix="/v1/compression/jobs", tags=["compression"])
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=256)]


@router.post("", status_code=202, responses=REPLAYED)
def create_job(body: JobRequest, stores: StoresOf, response: Response, idempotency_key: IdempotencyKey = None) -> Job:
    """Submit a job. What the plan finds in the way refuses it by name."""
    job, created = submit(stores, body, idempotency_key)
    response.headers["location"] = f"/v1/compression/jobs/{job.id}"
    if not created:
        response.status_code = 200
        response.headers["idempotent-replayed"] = "true"
    return job


@router.get("", openapi_extra=METADATA_FILTER)
def list_jobs(
    request: Request,
    stores: StoresOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[Job]:
    """List jobs, newest first; `metadata[key]=value` keeps those that carry it."""
    return stores.jobs.list(after=after, limit=limit, metadata=metadata_of(request))


@router.get("/{job_id}")
def get_job(job_id: str, stores: StoresOf) -> Job:
    """Read a job."""
    return stores.jobs.get(job_id)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, stores: StoresOf) -> Job:
    """Stop a job: at once while it waits, within seconds while it runs."""
    return stores.jobs.request_cancel(job_id)


@router.get("/{job_id}/events", response_model=Page[JobEvent], responses=STREAMED)
def list_events(
    job_id: str,
    request: Request,
    stores: StoresOf,
    after: str = "0",
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Page[JobEvent] | Response:
    """Read events after a sequence number; with `stream` or `Accept: text/event-stream`, as they happen."""
    if stream or wants_stream(request):
        return stream_events(stores.jobs, job_id, sequence_of(last_event_id or after, job_id, "Last-Event-ID"))
    return stores.jobs.events(job_id, after=sequence_of(after, job_id, "after"), limit=limit)


@router.get("/{job_id}/trace")
def get_trace(job_id: str, stores: StoresOf) -> ChromeTrace:
    """Read the time line of all attempts, for Perfetto or chrome://tracing; also while the job runs."""
    stores.jobs.get(job_id)
    return ChromeTrace.model_validate(chrome_trace(stores.layout, job_id))


@router.get("/{job_id}/report")
def get_report(job_id: str, stores: StoresOf) -> CompressionReport:
    """Read the before/after report."""
    return CompressionReport.model_validate(stores.jobs.report(job_id))
