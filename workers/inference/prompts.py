"""From a request to the token ids a model reads, and the room that is left for the answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticSerializationError

from api_schemas.errors import InvalidRequest
from api_schemas.inference import MOST_TOKENS, ChatRequest, CompletionRequest, Message, Sampling
from preflight.checkpoint import CONFIG
from preflight.strict_json import read_object
from preflight.tables import TEXT
from preflight.vision import loads_with_vision, why_no_images
from workers.inference.images.reading import ImageFile
from workers.inference.loading import LoadedModel
from workers.inference.registry import ModelSource
from workers.inference.sampling import choose_sampling
from workers.inference.stops import stop_strings
from workers.inference.tables.prompting import table_inputs, table_places, write_tables
from workers.inference.tables.reading import not_supported
from workers.inference.tasks import GenerationTask
from workers.inference.video_answers import video_task
from workers.inference.vision_prompts import (
    content_parts,
    places_images,
    refuse_marks,
    refuse_unreadable,
    vision_inputs,
    vision_template,
)

CHAT_MAX_TOKENS = 1024  # when the request names no limit; less when the context ends before
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions


def chat_task(loaded: LoadedModel, request: ChatRequest, images: Sequence[ImageFile] = ()) -> GenerationTask:
    """Return what to generate for a chat request.

    Args:
        loaded: the model.
        request: its messages have as many image parts as there are `images`.
        images: the files of these parts, in order.

    Raises:
        InvalidRequest: `chat_template_missing`, `chat_template_error`, `context_length_exceeded`, `invalid_stop`, or
            what `vision_prompts` raises about images and `tables.prompting` about tables.
    """
    if loaded.searches:
        return video_task(loaded, request, images, _requested_limit(request)[0])
    refuse_unreadable(loaded, images)
    prompt, pictures = _chat_inputs(loaded, request.messages, images)
    if not prompt:
        raise InvalidRequest("empty_prompt", "messages render to no tokens; give some content", "messages")
    limit, name = _requested_limit(request)
    room = answer_room(loaded, len(prompt), limit, (name, "messages"), CHAT_MAX_TOKENS)
    sampling = choose_sampling(request, loaded.defaults)
    stops = (*stop_strings(request.stop), *loaded.stops)
    return GenerationTask(prompt, room, sampling, stops, False, pictures, chat_logprobs(request), request.n)


def completion_task(loaded: LoadedModel, request: CompletionRequest) -> GenerationTask:
    """Return what to generate for a completion request.

    Raises:
        InvalidRequest: `empty_prompt`, `invalid_token`, `context_length_exceeded`, `invalid_stop` or
            `completion_not_supported`.
    """
    if loaded.searches:
        text = f"model '{loaded.source.id}' answers about frames and continues no text; POST /v1/chat/completions"
        raise InvalidRequest("completion_not_supported", text, "model")
    prompt = _completion_prompt(loaded, request.prompt)
    room = answer_room(loaded, len(prompt), request.max_tokens, ("max_tokens", "prompt"), COMPLETION_MAX_TOKENS)
    sampling = choose_sampling(request, loaded.defaults)
    return GenerationTask(
        prompt, room, sampling, stop_strings(request.stop), True, logprobs=request.logprobs, choices=request.n
    )


def chat_logprobs(request: ChatRequest) -> int | None:
    """Return how many likeliest tokens to list beside each token's log-probability; None asks for neither.

    Raises:
        InvalidRequest: `logprobs_missing`.
    """
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        text = f"top_logprobs is {request.top_logprobs} and logprobs is not true; set logprobs too, or leave both out"
        raise InvalidRequest("logprobs_missing", text, "top_logprobs")
    return None


def refuse_too_much(request: ChatRequest | CompletionRequest) -> None:
    """Refuse answers that together may be longer than one may be.

    Raises:
        InvalidRequest: `choices_too_long` or `conflicting_max_tokens`.
    """
    limit, name = (request.max_tokens, "max_tokens")
    if isinstance(request, ChatRequest):
        limit, name = _requested_limit(request)
    if limit is not None and request.n * limit > MOST_TOKENS:
        text = f"n is {request.n} and {name} {limit}, together more than {MOST_TOKENS} tokens; lower one of them"
        raise InvalidRequest("choices_too_long", text, "n")


def refuse_images(source: ModelSource, places: Sequence[str]) -> None:
    """Refuse images for a model that reads text alone, before anything is fetched or loaded.

    Args:
        source: the model.
        places: of the images in the request, at least one.

    Raises:
        InvalidRequest: `images_not_supported`, with the place of the first image.
    """
    config = read_object(source.folder / CONFIG, "invalid_config")
    if not loads_with_vision(config):
        why = why_no_images(config) or "this model reads text only"
        text = f"{places[0]} is an image, and {why}; send text or choose a vision model"
        raise InvalidRequest("images_not_supported", text, places[0])


def refuse_broken_text(request: Sampling) -> None:
    """Refuse half characters: JSON can spell a lone surrogate, and no tokenizer can read one.

    Raises:
        InvalidRequest: `invalid_unicode`.
    """
    try:
        request.model_dump_json()
    except PydanticSerializationError as error:
        text = "the request holds a lone surrogate such as \\ud800, which is no character; send valid Unicode"
        raise InvalidRequest("invalid_unicode", text) from error


def render_chat(
    tokenizer: Any, messages: Sequence[Message], template: str | None = None, *, in_parts: bool = False
) -> str:
    """Return the text of a conversation by the model's own chat template, ready for the assistant's turn.

    Args:
        tokenizer: renders, with its own template unless another is given.
        messages: the conversation.
        template: the processor's, where the model has one.
        in_parts: content goes to the template as a list of parts, not as text.

    Raises:
        InvalidRequest: `chat_template_missing`, or `chat_template_error` with what the template objects to.
    """
    if template is None and tokenizer.chat_template is None:
        text = "this model has no chat template, so it cannot chat; POST /v1/completions works with it"
        raise InvalidRequest("chat_template_missing", text, "model")
    template = template or tokenizer.get_chat_template()
    turns = [_turn(message, template, in_parts) for message in messages]
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
    try:
        return str(tokenizer.apply_chat_template(turns, **options))
    except Exception as error:  # the template is a program that came with the model: it can raise anything
        text = f"the model's chat template refuses these messages: {error}; see which roles and order it takes"
        raise InvalidRequest("chat_template_error", text, "messages") from error


def answer_room(
    loaded: LoadedModel, prompt_tokens: int, limit: int | None, params: tuple[str, str], default: int
) -> int:
    """Return how many tokens the answer may have.

    Args:
        loaded: whose context it is.
        prompt_tokens: tokens of the prompt.
        limit: what the request asks for, or None.
        params: names of the request's fields for the limit and for the prompt.
        default: the limit when the request names none.

    Raises:
        InvalidRequest: `context_length_exceeded`, with the numbers.
    """
    context = loaded.context_length
    if context is None:
        return limit or default
    start = f"model '{loaded.source.id}' has a context of {context} tokens; {params[1]} has {prompt_tokens}"
    if prompt_tokens >= context:
        message = f"{start}, which leaves none for the answer; shorten {params[1]}"
        raise InvalidRequest("context_length_exceeded", message, params[1])
    rest = context - prompt_tokens
    if limit is not None and limit > rest:
        message = f"{start} and {params[0]} asks for {limit} more; ask for at most {rest} or shorten {params[1]}"
        raise InvalidRequest("context_length_exceeded", message, params[0])
    return limit or min(rest, default)


def _requested_limit(request: ChatRequest) -> tuple[int | None, str]:
    if request.max_completion_tokens is None:
        return request.max_tokens, "max_tokens"
    if request.max_tokens not in (None, request.max_completion_tokens):
        text = f"max_tokens is {request.max_tokens}, max_completion_tokens is {request.max_completion_tokens}; give one"
        raise InvalidRequest("conflicting_max_tokens", text, "max_tokens")
    return request.max_completion_tokens, "max_completion_tokens"


def _chat_inputs(
    loaded: LoadedModel, messages: Sequence[Message], images: Sequence[ImageFile]
) -> tuple[list[int], Mapping[str, Any]]:
    template, reader = vision_template(loaded), loaded.tables
    if reader is None and (places := table_places(messages)):
        raise not_supported(loaded.source.id, places[0])
    messages, frames = write_tables(reader.rule, messages) if reader is not None else (messages, [])
    text = render_chat(loaded.tokenizer, messages, template, in_parts=template is not None and places_images(template))
    if reader is not None and reader.rule.rule != TEXT:
        prompt, tables = table_inputs(reader, loaded.tokenizer, text, frames)
        return prompt, {name: value.to(loaded.precision.device) for name, value in tables.items()}
    if loaded.processor is None:
        return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]), {}
    refuse_marks(loaded, messages)
    return vision_inputs(loaded, text, images)


def _turn(message: Message, template: str, in_parts: bool) -> dict[str, Any]:
    """Only roles a template mentions reach it as they are: `developer` is OpenAI's newer word for `system`."""
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    content: str | list[dict[str, str]]
    if in_parts:
        content = content_parts(message)
    elif isinstance(message.content, str):
        content = message.content
    else:
        content = "\n".join(part.text for part in message.content if part.type == "text")
    more = {"name": message.name, "tool_call_id": message.tool_call_id}
    return {"role": role, "content": content} | {key: value for key, value in more.items() if value}


def _completion_prompt(loaded: LoadedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        tokens = list(loaded.tokenizer(prompt)["input_ids"])
        if not tokens and loaded.tokenizer.bos_token_id is not None:
            return [loaded.tokenizer.bos_token_id]
        if not tokens:
            raise InvalidRequest("empty_prompt", "prompt is empty; give at least one character", "prompt")
        return tokens
    for index, token in enumerate(prompt):
        if token >= loaded.vocabulary:
            place = f"prompt.{index}"
            text = f"{place} is token {token}, and this model's vocabulary ends at {loaded.vocabulary - 1}"
            raise InvalidRequest("invalid_token", text, place)
    return prompt
