"""Logs as one JSON object a line, on standard output, with the ids of the request and the job they are about."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]*@")
SERVER_LOGS = ("uvicorn", "uvicorn.access", "uvicorn.error")  # they bring handlers of their own
_ids: ContextVar[dict[str, str] | None] = ContextVar("ids", default=None)


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Let every record inside, of this thread or task, carry these ids (`request_id`, `job_id`)."""
    token = _ids.set({**(_ids.get() or {}), **ids})
    try:
        yield
    finally:
        _ids.reset(token)


class JsonLine(logging.Formatter):
    """One line per record; user names and passwords in URLs are left out."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            **(_ids.get() or {}),
            "message": CREDENTIALS.sub("***@", record.getMessage()),
        }
        if record.exc_info:
            entry["error"] = CREDENTIALS.sub("***@", self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


def configure(level: str) -> None:
    """Send every log record of this process, and of those it forks, to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLine())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells every process what version the schema has
    for name in SERVER_LOGS:
        server = logging.getLogger(name)
        server.handlers.clear()
        server.propagate = True
