"""A job's time line in the form that Perfetto and chrome://tracing open."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api_schemas.base import Frozen


class ChromeTrace(Frozen):
    """Answer of `/v1/compression/jobs/{id}/trace`.

    Reference: "Trace Event Format", Google, sec. "JSON Object Format"; the names are the format's own.
    """

    traceEvents: Annotated[  # noqa: N815
        list[dict[str, Any]],
        Field(description="`X` slices, `C` counters, `i` faults, `M` names; one `pid` per attempt; microseconds"),
    ]
    displayTimeUnit: Literal["ms"] = "ms"  # noqa: N815
    otherData: Annotated[dict[str, Any], Field(description="the job, and when time 0 was")]  # noqa: N815
