"""Server-sent events: the lines of a stream as (id, event, data)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One event of a stream."""

    id: str | None
    event: str
    data: str


def parse(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """Yield the events of a stream; comments (keep-alives) are passed over, an unfinished last event is dropped."""
    identity: str | None = None
    event, data = "message", list[str]()
    for line in lines:
        if not line:
            if data:
                yield ServerSentEvent(identity, event, "\n".join(data))
            event, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            event = value
        elif field == "id":
            identity = value
