"""The verbs of `modepress.Client` that look at the service itself: time lines and workers."""

from api_schemas.listing import Page
from api_schemas.traces import ChromeTrace
from api_schemas.workers import Worker
from modepress.connection import Connection


class Observing:
    """A part of `modepress.Client`, which has the connection."""

    _connection: Connection

    def workers(self, *, limit: int = 20) -> list[Worker]:
        """Return the latest workers, newest first, with what each found of itself."""
        found: Page[Worker] = self._connection.call("GET", "/v1/workers", Page[Worker], params={"limit": limit})
        return found.data

    def trace(self, job_id: str) -> ChromeTrace:
        """Return a job's time line, for Perfetto or chrome://tracing."""
        return self._connection.call("GET", f"/v1/compression/jobs/{job_id}/trace", ChromeTrace)
