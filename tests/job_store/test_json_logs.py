"""The worker's log: one JSON object a line, no secrets."""

import json
import logging
import sys

from workers.logs import JsonLine


def test_a_record_is_one_line_without_credentials() -> None:
    try:
        raise ValueError("redis://user:hunter2@host/0\nsecond line")
    except ValueError:
        record = logging.LogRecord("w", logging.ERROR, "f", 1, "lost %s", ("redis://:hunter2@host/0",), sys.exc_info())
    line = JsonLine().format(record)
    assert "\n" not in line
    assert "hunter2" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["message"]) == ("ERROR", "lost redis://***@host/0")
    assert "second line" in entry["error"]
