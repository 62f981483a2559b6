"""The worker's log: one JSON object a line, no secrets."""

import json
import logging
import sys

from job_store.json_logs import JsonLine, about


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


def test_records_carry_the_ids_they_are_about() -> None:
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "said", (), None)
    with about(request_id="req_1"), about(job_id="job-1"):
        inside = json.loads(JsonLine().format(record))
    assert (inside["request_id"], inside["job_id"]) == ("req_1", "job-1")
    outside = json.loads(JsonLine().format(record))
    assert "request_id" not in outside
    assert "job_id" not in outside
