"""What the supervisor tells the job process (`job.json`), and what it gets back (`result.json`)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api_schemas.base import Frozen
from api_schemas.errors import ErrorBody
from api_schemas.imports import ImportRequest
from api_schemas.recipe import Recipe

ARTIFACT = "artifact"
RESULT = "result.json"

EXIT_OK = 0
EXIT_FAILED = 10  # result.json says why
EXIT_CANCELLED = 11
EXIT_DISK_FULL = 12  # there may be no room for a result.json
EXIT_OUT_OF_MEMORY = 13
STACKS = "stacks.txt"  # where SIGUSR1 makes the job process write what it is doing


class JobDescription(Frozen):
    """Everything a job process needs; it opens no database and knows no broker."""

    job_id: str
    model: str
    compressed_model: Annotated[str, Field(description="id that the artifact will be registered under")]
    source: Annotated[str, Field(description="folder of the original checkpoint")]
    recipe: Recipe
    files: Annotated[dict[str, str], Field(description="uploaded texts: file id to path")]
    roots: Annotated[tuple[str, ...], Field(description="folders that texts of source `file` may be read from")]
    hub_offline: bool
    threads: int
    fence: int
    chunk_tokens: Annotated[int, Field(ge=1, description="tokens run at once; fewer after running out of memory")]
    device: str = "auto"


class JobResult(Frozen):
    """How a job process ended by itself."""

    status: Literal["succeeded", "failed"]
    report: dict[str, Any] | None
    error: ErrorBody | None
    peak_rss_bytes: int


class FetchDescription(Frozen):
    """What a download process is told."""

    hub_id: str
    revision: str | None
    hub_offline: bool


class ImportDescription(Frozen):
    """What an import process is told."""

    originals: ImportRequest


class FetchResult(Frozen):
    """How a download or an import ended: facts of a sound checkpoint, or an error."""

    facts: dict[str, Any] | None
    error: ErrorBody | None
