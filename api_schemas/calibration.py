"""Where calibration and evaluation text comes from, and how much of it is used.

A text file is tokenised whole, without special tokens, and cut into consecutive windows of `sequence_length`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from api_schemas.base import Frozen

Source = Literal["file", "upload", "hub", "self", "builtin"]


class TextSource(Frozen):
    """A text: a server-side file, an uploaded file, a hub data set, the model's own writing or Python's own prose."""

    source: Annotated[
        Source,
        Field(
            description="file: a .txt or .jsonl under an allowed root; upload: an uploaded file; hub: a data set the "
            "worker downloads; self: the model writes it; builtin: Python's pydoc_data.topics"
        ),
    ] = "builtin"
    path: Annotated[str | None, Field(max_length=4096, description="for source file")] = None
    file_id: Annotated[str | None, Field(max_length=64, description="for source upload")] = None
    dataset: Annotated[str | None, Field(max_length=256, description="for source hub, e.g. 'wikitext'")] = None
    subset: Annotated[str | None, Field(max_length=256, description="for source hub: its configuration")] = None
    split: Annotated[str, Field(max_length=64, description="for source hub")] = "train"
    text_field: Annotated[str, Field(max_length=128, description="the key that holds text in JSONL or hub rows")] = (
        "text"
    )
    sequence_length: Annotated[int, Field(ge=16, le=131072, description="tokens per window")] = 2048

    @model_validator(mode="after")
    def _source_has_its_field(self) -> Self:
        needed = {"file": "path", "upload": "file_id", "hub": "dataset"}
        for source, field in needed.items():
            if self.source == source and getattr(self, field) is None:
                raise ValueError(f"source {source!r} needs {field!r}")
            if self.source != source and getattr(self, field) is not None:
                raise ValueError(f"{field!r} belongs to source {source!r}, not {self.source!r}")
        return self


class Calibration(TextSource):
    """The text whose activations the statistics are taken from."""

    num_samples: Annotated[int, Field(ge=1, le=65536, description="windows wanted")] = 16
    forward: Annotated[
        Literal["float32", "bfloat16"],
        Field(
            description="dtype of the products in the calibration's forward passes; hidden states, statistics and "
            "solves stay as they are. bfloat16 is faster where the processor has it, and the result a little different"
        ),
    ] = "float32"
    image_field: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=128,
            description="the key that holds an image in JSONL rows: a path beside the file, or {'bytes': base64}; for "
            "vision-language models, null calibrates on text alone",
        ),
    ] = None

    @model_validator(mode="after")
    def _images_stand_in_rows(self) -> Self:
        if self.image_field is not None and self.source not in ("file", "upload"):
            raise ValueError(
                f"'image_field' belongs to source 'file' or 'upload', whose rows are read, not {self.source!r}"
            )
        if self.image_field is not None and self.image_field == self.text_field:
            raise ValueError(f"'image_field' and 'text_field' are both {self.text_field!r}; name two keys")
        return self


class Evaluation(TextSource):
    """The text on which before and after are measured; must not be the calibration text."""

    num_windows: Annotated[int, Field(ge=1, le=65536, description="windows wanted")] = 8
    generation_tokens: Annotated[
        int, Field(ge=0, le=4096, description="tokens generated to measure speed and memory; 0 leaves it out")
    ] = 32


class Gate(Frozen):
    """Limits that fail the job with code `quality_gate`; the artifact is kept."""

    perplexity_increase: Annotated[
        float, Field(gt=0.0, description="relative: 0.5 fails when perplexity rises by more than half")
    ]
