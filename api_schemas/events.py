"""Progress events: for people. They carry a sequence number; reports carry the facts."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api_schemas.base import Frozen

Stage = Literal["preparing", "calibrating", "compressing", "quantizing", "exporting", "verifying", "evaluating"]
Level = Literal["info", "warn", "error"]


class ProgressEvent(Frozen):
    """What a job process says while it works."""

    level: Level = "info"
    message: str
    stage: Stage
    block: Annotated[int | None, Field(description="index of the decoder block just finished")] = None
    blocks_total: int | None = None
    percent: Annotated[float, Field(ge=0.0, le=100.0)]
    data: Annotated[dict[str, Any], Field(default_factory=dict)]


class JobEvent(Frozen):
    """One row of `/v1/compression/jobs/{id}/events` (OpenAI's event shape plus `sequence`)."""

    id: str
    object: Literal["compression.job.event"] = "compression.job.event"
    created_at: int
    level: Level
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any]
    sequence: int
