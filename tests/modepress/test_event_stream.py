"""Server-sent events."""

from modepress.event_stream import ServerSentEvent, parse


def test_fields_comments_and_joined_lines() -> None:
    lines = [": keep-alive", "", "id: 7", "event: job.event", "data: {", "data: }", "", "data:bare", ""]
    assert list(parse(lines)) == [ServerSentEvent("7", "job.event", "{\n}"), ServerSentEvent("7", "message", "bare")]


def test_an_unfinished_event_is_dropped() -> None:
    assert list(parse(["data: whole", "", "data: half"])) == [ServerSentEvent(None, "message", "whole")]
