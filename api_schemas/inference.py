"""OpenAI's chat and completion requests, as far as they are honoured. Unknown fields are refused, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictBool, StrictInt, Tag

from api_schemas.base import Frozen
from api_schemas.table_parts import TablePart

Stop = str | Annotated[list[str], Field(max_length=4)] | None

COUNT_TOKENS = "x-modepress-count-tokens"  # the API asks for a comment at the end of a stream: `: tokens 123`

MOST_TOKENS = 1_000_000  # of all choices of a request together

OWN_LOGPROB = (
    "its log-probability by the model alone: log-softmax of the raw logits, before temperature, filters and penalties"
)


class TextPart(Frozen):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageAddress(Frozen):
    """Where an image is: in the URL itself (`data:`), or on a host that the server may fetch from."""

    url: Annotated[str, Field(min_length=1, description="data:image/png;base64,… or http(s)://…")]
    detail: Annotated[Literal["auto"], Field(description="the model's own processor chooses the resolution")] = "auto"


class ImagePart(Frozen):
    """An image part. Text-only models refuse it with a 400 that says so."""

    type: Literal["image_url"]
    image_url: ImageAddress


def _known_role(role: str) -> str:
    """TableGPT's agent calls the assistant `ai`."""
    return "assistant" if role == "ai" else role


def _kind_of_content(content: Any) -> str:
    """Which form is meant, so that a mistake in a part is named and not the form that was not chosen."""
    return "parts" if isinstance(content, list) else "text"


class Message(Frozen):
    """One turn of a conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "ai"], AfterValidator(_known_role)
    ]  # `ai` is read as `assistant`
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[Annotated[TextPart | ImagePart | TablePart, Field(discriminator="type")]], Tag("parts")],
        Discriminator(_kind_of_content),
    ]
    name: str | None = None
    tool_call_id: Annotated[str | None, Field(max_length=256, description="of a `tool` message, for the template")] = (
        None
    )


Engine = Literal["transformers", "onnx-float32", "onnx-int8", "onnx-int4"]


class StreamOptions(Frozen):
    """Whether the last chunk carries usage."""

    include_usage: bool = False


class Sampling(Frozen):
    """What chat and completion requests share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    temperature: Annotated[float | None, Field(ge=0.0, le=2.0)] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    n: Annotated[
        int,
        Field(
            ge=1,
            le=8,
            description="how many choices, each with a seed derived from `seed` and its index; n times the most tokens "
            f"of a choice is at most {MOST_TOKENS}",
        ),
    ] = 1
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    engine: Annotated[
        Engine | None,
        Field(
            description="what answers: the model's own weights in transformers, as without this field, or one of its "
            "ONNX graphs in onnxruntime; capabilities.engines of the model lists them"
        ),
    ] = None
    user: Annotated[str | None, Field(max_length=256)] = None


class ChatRequest(Sampling):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    logprobs: Annotated[StrictBool | None, Field(description=f"whether each token comes with {OWN_LOGPROB}")] = None
    top_logprobs: Annotated[
        StrictInt | None,
        Field(ge=0, le=20, description="how many likeliest tokens are listed at each place; needs logprobs: true"),
    ] = None


class CompletionRequest(Sampling):
    """Body of `POST /v1/completions`: one prompt, as text or as token ids."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    logprobs: Annotated[
        StrictInt | None,
        Field(ge=0, le=5, description=f"each token comes with {OWN_LOGPROB}, and with this many likeliest tokens"),
    ] = None


class TokenUsage(Frozen):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
