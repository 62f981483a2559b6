"""What the framework cannot know about our routes: error answers, multipart bodies, deep query parameters."""

from typing import Any, get_args

from api_schemas.errors import ErrorResponse
from api_schemas.files import Purpose
from api_schemas.jobs import Job

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The caller's fault; `code` and `param` say which"},
    "5XX": {"model": ErrorResponse, "description": "Ours, or a part of the service is away"},
}


def _multipart(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


BINARY = {"type": "string", "format": "binary"}
PART_BODY = _multipart(
    {"data": BINARY, "number": {"type": "integer", "minimum": 0, "maximum": 10**6, "description": "place of the part"}},
    ["data"],
)
FILE_BODY = _multipart(
    {"file": BINARY, "purpose": {"type": "string", "enum": list(get_args(Purpose))}},
    ["file", "purpose"],
)
METADATA_FILTER = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "jobs that carry all of these: `metadata[key]=value`",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 16},
        }
    ]
}
BYTES = {"application/octet-stream": {"schema": BINARY}}
RANGED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes", "content": BYTES},
    206: {"description": "The bytes that `Range` asked for", "content": BYTES},
    304: {"description": "`If-None-Match` names these bytes: you have them"},
}
REPLAYED: dict[int | str, dict[str, Any]] = {
    200: {"model": Job, "description": "The job that this `Idempotency-Key` made before (`Idempotent-Replayed: true`)"}
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}},
    "5XX": {"model": ErrorResponse, "description": "The database is away"},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events, or all of them as they happen: `job.event` (id = sequence), at last "
        "`job.status` with the job",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's object, or its chunks as server-sent events when `stream` is true",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
