"""A job's time line as one Chrome-trace document, and where its time went: read from the files of all attempts.

A slice's own time is its length without the slices inside it. Of an attempt that was killed the outer slices are
missing (they are written when they end); what was written counts, and the rest of its time is called lost.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from api_schemas.errors import NotFound
from api_schemas.heartbeats import Work
from api_schemas.reports import JobTime, TimeShare
from job_store.layout import Layout
from job_store.trace_files import WORK_THREAD

Event = dict[str, Any]
WORKS: tuple[str, ...] = get_args(Work)
ATTEMPT = "attempt"  # the slice of a job process's whole life


def read_events(layout: Layout, job_id: str) -> list[Event]:
    """All events of all attempts, as they were written; a line that was cut off by a kill is left out."""
    folder = layout.trace(job_id)
    files = sorted(folder.glob("*.json")) if folder.exists() else []
    return [event for path in files for event in _lines(path)]


def chrome_trace(layout: Layout, job_id: str) -> dict[str, Any]:
    """The document that Perfetto and chrome://tracing open; times begin at 0.

    Raises:
        NotFound: no attempt at the job has begun, or it was made before there were time lines.
    """
    events = read_events(layout, job_id)
    if not events:
        raise NotFound("trace_not_ready", f"job {job_id!r} has no time line: none of its attempts has begun", "job_id")
    timed = sorted((event for event in events if "ts" in event), key=lambda event: (event["ts"], -event.get("dur", 0)))
    zero = timed[0]["ts"] if timed else 0.0
    moved = [{**event, "ts": round(event["ts"] - zero, 1)} for event in timed]
    names = [event for event in events if "ts" not in event]
    return {
        "traceEvents": names + moved,
        "displayTimeUnit": "ms",
        "otherData": {"job": job_id, "zero_unix_us": zero},
    }


def job_time(events: Iterable[Event], *, began: float, ended: float, report: Mapping[str, Any]) -> JobTime:
    """Where the seconds of a job went, from its first attempt to its end.

    Args:
        events: of all attempts, the last of which has succeeded.
        began: seconds since 1970 when the first attempt was started.
        ended: likewise, when the last one had ended.
        report: its `seconds` and `blocks` say what the result holds.
    """
    by_attempt: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["tid"] == WORK_THREAD:
            by_attempt[event["pid"]].append(event)
    seconds = dict.fromkeys(WORKS, 0.0)
    for slices in by_attempt.values():
        for work, spent in _counted(slices).items():
            seconds[work] += spent
    wall = max(1e-9, ended - began)
    lost = max(0.0, wall - sum(seconds.values()))
    last = by_attempt[max(by_attempt)] if by_attempt else []
    solved = {(one["args"]["step"], one["args"]["block"]) for one in last if one["name"] == "block"}
    earlier = sum(row["seconds"] for row in report["blocks"] if (row["step"], row["block"]) not in solved)
    shares = {work: TimeShare(seconds=round(spent, 3), share=spent / wall) for work, spent in seconds.items() if spent}
    return JobTime(
        wall_seconds=round(wall, 3),
        attempts=len(by_attempt),
        spent=shares,
        lost=TimeShare(seconds=round(lost, 3), share=lost / wall),
        effective_rate=min(1.0, (report["seconds"] + earlier) / wall),
    )


def _counted(slices: list[Event]) -> dict[str, float]:
    """What an attempt counted itself; else, where it was killed, what its slices show."""
    whole = next((one for one in slices if one["name"] == ATTEMPT), None)
    if whole is None:
        return own_seconds(slices)
    seconds: dict[str, float] = dict(whole["args"]["seconds"])
    for one in slices:
        if one["ts"] < whole["ts"]:
            seconds[one["cat"]] += one["dur"] / 1e6
    return seconds


def own_seconds(slices: Iterable[Event]) -> dict[str, float]:
    """Own time by kind of work of the slices of one thread, which nest.

    Args:
        slices: with `ts` and `dur` in microseconds and the kind of work as `cat`.
    """
    seconds: dict[str, float] = defaultdict(float)
    ends: list[tuple[float, str]] = []
    for one in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1][0] <= one["ts"] + one["dur"] / 2:
            ends.pop()
        if ends:
            seconds[ends[-1][1]] -= one["dur"] / 1e6
        seconds[one["cat"]] += one["dur"] / 1e6
        ends.append((one["ts"] + one["dur"], one["cat"]))
    return dict(seconds)


def _lines(path: Path) -> Iterable[Event]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.strip().removesuffix(",")
        if not text.startswith("{"):
            continue
        try:
            yield json.loads(text)
        except ValueError:  # its writer was killed amid this line
            continue
