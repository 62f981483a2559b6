"""A chat request as it is sent, and the answer as far as this client reads it."""

import base64
import mimetypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from api_schemas.errors import ErrorResponse, InvalidRequest
from api_schemas.inference import ChatRequest, TokenUsage
from modepress.api_error import ModepressApiError

Messages = Sequence[Mapping[str, Any]]
Files = Sequence[str | os.PathLike[str]]
NOT_READ = {"n": 1, "logprobs": False}  # fields whose answers this client has no place for, and what they may be


class _Text(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Text | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """A chat completion, or one chunk of a streamed one."""

    choices: list[_Choice]
    usage: TokenUsage | None = None


class ChatAnswer(BaseModel):
    """A whole answer."""

    model: str
    text: str
    finish_reason: str | None
    usage: TokenUsage | None


class ChatPiece(BaseModel):
    """A piece of a streamed answer; the last ones carry the reason it ended and the tokens used."""

    text: str
    finish_reason: str | None = None
    usage: TokenUsage | None = None


def request(model_id: str, messages: Messages | str, sampling: Mapping[str, Any], images: Files = ()) -> ChatRequest:
    """Build the body of a chat request; a string is one user message, with the images before it.

    Raises:
        InvalidRequest: `image_unreadable`; `images_need_text` when the messages are given whole; `not_read` for what
            this client does not show.
    """
    for name, neutral in NOT_READ.items():
        if sampling.get(name) not in (None, neutral):
            message = f"{name} is {sampling[name]}, and this client reads one text; take the openai client for it"
            raise InvalidRequest("not_read", message, name)
    if images and not isinstance(messages, str):
        message = "images are files beside a text; in messages given whole, images are parts of their content"
        raise InvalidRequest("images_need_text", message, "images")
    pictures = [image_part(Path(file)) for file in images]
    turns = [user_turn(messages, pictures)] if isinstance(messages, str) else list(messages)
    return ChatRequest.model_validate({"model": model_id, "messages": turns, **sampling})


def image_part(path: Path) -> dict[str, Any]:
    """Return a file as an image part of a message; the server looks at what it is.

    Raises:
        InvalidRequest: `image_unreadable`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"image {str(path)!r} cannot be read: {error.strerror}; give a PNG, JPEG, WebP or GIF file"
        raise InvalidRequest("image_unreadable", message, "image") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    url = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def user_turn(text: str, pictures: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return a user's message: its images, then its text."""
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}] if pictures else text}


def answer(model_id: str, completion: Completion) -> ChatAnswer:
    """Read a whole answer."""
    choice = completion.choices[0]
    text = (choice.message.content if choice.message else None) or ""
    return ChatAnswer(model=model_id, text=text, finish_reason=choice.finish_reason, usage=completion.usage)


def piece(data: str) -> ChatPiece:
    """Read one data line of a streamed answer.

    Raises:
        ModepressApiError: the line is the error with which the server ended the stream.
    """
    try:
        chunk = Completion.model_validate_json(data)
    except ValidationError:
        # An error after the first byte comes as a data line: the status was sent long ago.
        raise ModepressApiError(500, ErrorResponse.model_validate_json(data, extra="ignore").error) from None
    if not chunk.choices:
        return ChatPiece(text="", usage=chunk.usage)
    choice = chunk.choices[0]
    text = (choice.delta.content if choice.delta else None) or ""
    return ChatPiece(text=text, finish_reason=choice.finish_reason, usage=chunk.usage)
