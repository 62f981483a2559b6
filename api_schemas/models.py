"""Registered models: what was uploaded, pointed at or made by a job."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from api_schemas.base import Frozen
from api_schemas.imports import ImportRequest
from api_schemas.plans import Blocker, ModelPart

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
RelativePath = Annotated[str, Field(min_length=1, max_length=512)]


class CheckpointFacts(Frozen):
    """What a checkpoint is, read from its configuration and headers without loading weights."""

    model_type: str
    architecture: str
    family: Annotated[str | None, Field(description="the family table that fits, or null")]
    modality: Literal["text", "image-text", "table-text"] = "text"
    parts: Annotated[
        tuple[ModelPart, ...], Field(description="of a model whose decoder is one part of several; else empty")
    ] = ()
    engines: Annotated[
        tuple[str, ...], Field(description="what it can be answered from here: its weights, and ONNX graphs in it")
    ] = ("transformers",)
    reads_images: Annotated[bool, Field(description="whether chat with it takes images here")] = False
    reads_tables: Annotated[bool, Field(description="whether chat with it takes tables here")] = False
    parameters: int
    block_parameters: int
    blocks: int
    bytes: Annotated[int, Field(description="of all tensors")]
    dtype: Annotated[str, Field(description="of most parameters, e.g. BF16")]
    dtypes: dict[str, int]
    tied_head: bool
    vocabulary: int
    context_length: int | None
    has_tokenizer: bool
    has_chat_template: bool
    blockers: Annotated[tuple[Blocker, ...], Field(description="why no recipe could run on it")]
    warnings: tuple[str, ...]


class ModelFile(Frozen):
    """One file of a model to be registered: an uploaded file and its name inside the model folder."""

    file_id: Annotated[str, Field(min_length=1, max_length=64)]
    path: RelativePath


class ModelRequest(Frozen):
    """Body of `POST /v1/models`: exactly one of `files`, `path`, `hub_id` and `originals`."""

    name: ModelName
    files: Annotated[tuple[ModelFile, ...] | None, Field(min_length=1, max_length=4096)] = None
    path: Annotated[str | None, Field(max_length=4096, description="a folder under an allowed root")] = None
    hub_id: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?$")] = None
    revision: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9._/-]{1,128}$", description="for hub_id")] = None
    originals: Annotated[
        ImportRequest | None,
        Field(description="published files of a family with an importer, as paths under an allowed root"),
    ] = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        ways = ("files", "path", "hub_id", "originals")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways[:-1])} and {ways[-1]}, not {given or 'none'}")
        if self.revision is not None and self.hub_id is None:
            raise ValueError("revision belongs to hub_id")
        return self


class Model(Frozen):
    """A model that can be compressed or chatted with (OpenAI's model object, extended)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "modepress"
    status: Annotated[
        Literal["downloading", "ready", "failed"], Field(description="downloading: a worker fetches or imports it")
    ]
    origin: Literal["upload", "path", "hub", "job", "import"]
    parent: Annotated[str | None, Field(description="the model this artifact was made from")]
    job: str | None
    facts: CheckpointFacts | None
    error: Blocker | None = None
    capabilities: dict[str, list[str]]


class ModelFileObject(Frozen):
    """A file that can be downloaded from a model's folder."""

    object: Literal["model.file"] = "model.file"
    path: Annotated[str, Field(description="inside the folder, with forward slashes")]
    bytes: int
    sha256: Annotated[
        str | None, Field(description="null where nobody has counted it yet: ask for the list with `digests=all`")
    ]
    belongs_to: Annotated[
        str,
        Field(
            description="checkpoint: weights, configuration, tokenizer and records; gguf, vllm: that export; exports: "
            "what serves all of them"
        ),
    ]
    layout: Annotated[str | None, Field(description="of an artifact's checkpoint: portable, nemotron or full")]


class Deleted(Frozen):
    """Answer to a DELETE."""

    id: str
    object: str
    deleted: Literal[True] = True
