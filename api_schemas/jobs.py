"""Compression jobs, in the shape of OpenAI's fine-tuning jobs with `cancelling` added."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from api_schemas.base import Frozen
from api_schemas.errors import ErrorBody
from api_schemas.heartbeats import Heartbeat
from api_schemas.recipe import Recipe

JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]


class JobRequest(Frozen):
    """Body of `POST /v1/compression/jobs`."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    recipe: Recipe
    suffix: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="ends the name of the compressed model"),
    ] = None
    metadata: Annotated[Metadata, Field(default_factory=dict)]


class Progress(Frozen):
    """How far a job is."""

    stage: str | None = None
    block: int | None = None
    blocks_total: int | None = None
    percent: float = 0.0


class Usage(Frozen):
    """What a job took so far."""

    seconds: float | None = None
    peak_rss_bytes: int | None = None


class Job(Frozen):
    """A compression job."""

    id: str
    object: Literal["compression.job"] = "compression.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: JobStatus
    model: str
    compressed_model: Annotated[str | None, Field(description="id of the artifact, once it exists")]
    recipe: Recipe
    recipe_hash: str
    seed: int
    progress: Progress
    usage: Usage
    attempt: int
    heartbeat: Annotated[Heartbeat | None, Field(description="the latest; null before the first")] = None
    error: ErrorBody | None
    result_files: tuple[str, ...]
    metadata: Metadata
