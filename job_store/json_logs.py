"""Logs of the worker: one JSON object a line, on standard output."""

import json
import logging
import re
import sys
from datetime import UTC, datetime

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]*@")


class JsonLine(logging.Formatter):
    """One line per record; user names and passwords in URLs are left out."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
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
