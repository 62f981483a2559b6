"""Captions of frames and answers about them, by models whose answers are searched as a whole (mPLUG-2).

Such a model reads the frames of one message, and a question where it was trained for questions. It knows no
conversation, samples nothing, and gives its answer in one piece.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from api_schemas.errors import InvalidCheckpoint, InvalidRequest
from api_schemas.inference import ChatRequest, ImagePart, Message, TextPart
from compression.runtime.beam_search import BeamSettings
from compression.runtime.mplug2 import frame_pixels
from workers.inference.images.reading import ImageFile
from workers.inference.loading import LoadedModel
from workers.inference.sampling import choose_sampling
from workers.inference.stops import StopFilter, stop_strings
from workers.inference.tasks import FinishReason, GenerationTask, Piece

SAMPLED = {
    "temperature": 0.0,
    "top_p": 1.0,
    "n": 1,
    "logprobs": False,
}  # what may be asked for: a search does just that


def video_task(
    loaded: LoadedModel, request: ChatRequest, images: Sequence[ImageFile], limit: int | None
) -> GenerationTask:
    """Return what to search for a chat request.

    Args:
        loaded: a model that searches.
        request: one user message, with as many image parts as there are `images`.
        images: frames, in order; one stands still.
        limit: most tokens of the answer, or None.

    Raises:
        InvalidRequest: `one_message_only`, `part_not_read`, `frames_missing`, `question_missing`,
            `sampling_not_supported`, `context_length_exceeded`, `invalid_stop`, or what decoding raises.
    """
    _refuse_sampling(loaded, request)
    message = _only_message(loaded, request.messages)
    if not images:
        text = f"model '{loaded.source.id}' answers about frames; add at least one image_url part"
        raise InvalidRequest("frames_missing", text, "messages.0.content")
    tokens = _question(loaded, message)
    config, device = loaded.model.config, loaded.precision.device
    frames = [torch.from_numpy(np.array(image.decode().convert("RGB"))) for image in images]
    inputs = {"pixel_values": frame_pixels(frames, config).to(device, loaded.model.dtype)}
    if tokens:
        inputs["input_ids"] = torch.tensor([tokens], device=device)
    longest = BeamSettings(**config.beams).longest
    return GenerationTask(
        prompt=tokens or [config.beams["start"]],
        max_tokens=longest if limit is None else min(limit, longest),
        sampling=choose_sampling(request, loaded.defaults),
        stops=stop_strings(request.stop),
        continues_prompt=False,
        pictures=inputs,
    )


def searched(loaded: LoadedModel, task: GenerationTask) -> Piece:
    """Return the whole answer; the best that the search found.

    Raises:
        InvalidCheckpoint: `model_output_not_finite`.
    """
    config = loaded.model.config
    settings = replace(BeamSettings(**config.beams), longest=task.max_tokens)
    score, tokens = loaded.model.generate(**task.pictures, settings=settings)[0][0]
    if score != score:  # NaN is not itself
        message = f"model '{loaded.source.id}' computes NaN; its weights are damaged, so register sound ones"
        raise InvalidCheckpoint("model_output_not_finite", message, "model")
    written = tokens[1:]
    ended = settings.end in written
    text = loaded.tokenizer.decode(written[: written.index(settings.end)] if ended else written)
    if config.prompt:  # captions were learned behind these words
        text = text.split(config.prompt)[-1]
    stops = StopFilter(task.stops)
    kept, stopped = stops.feed(text.strip())
    reason: FinishReason = "stop" if ended or stopped else "length"
    return Piece(kept if stopped else kept + stops.flush(), len(written), reason)


def _refuse_sampling(loaded: LoadedModel, request: ChatRequest) -> None:
    for name, neutral in SAMPLED.items():
        value = getattr(request, name)
        if value not in (None, neutral):
            text = f"{name} is {value}, and model '{loaded.source.id}' searches one answer as a whole; leave it out"
            raise InvalidRequest("sampling_not_supported", text, name)


def _only_message(loaded: LoadedModel, messages: Sequence[Message]) -> Message:
    """The one message; a conversation would be forgotten without a word."""
    if len(messages) != 1 or messages[0].role != "user":
        roles = ", ".join(message.role for message in messages[:5])
        text = (
            f"messages are of {roles}, and model '{loaded.source.id}' reads one message of the user alone; "
            "send no conversation"
        )
        raise InvalidRequest("one_message_only", text, "messages")
    return messages[0]


def _question(loaded: LoadedModel, message: Message) -> list[int]:
    """The tokens of a question; none for captions."""
    config = loaded.model.config
    parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    for position, part in enumerate(parts):
        unread = not isinstance(part, ImagePart) and (config.task == "caption" or not isinstance(part, TextPart))
        if unread and not (isinstance(part, TextPart) and not part.text.strip()):
            place = f"messages.0.content.{position}"
            takes = "frames alone" if config.task == "caption" else "frames and text"
            message_text = f"{place} is of type {part.type}, and model '{loaded.source.id}' reads {takes}; leave it out"
            raise InvalidRequest("part_not_read", message_text, place)
    if config.task == "caption":
        return []
    said = "\n".join(part.text for part in parts if isinstance(part, TextPart)).strip()
    if not said:
        text = f"model '{loaded.source.id}' answers questions; add a text part that asks one"
        raise InvalidRequest("question_missing", text, "messages.0.content")
    tokens = list(loaded.tokenizer(said)["input_ids"])
    if len(tokens) > config.text["positions"]:
        text = f"the question has {len(tokens)} tokens and this model reads {config.text['positions']}; shorten it"
        raise InvalidRequest("context_length_exceeded", text, "messages.0.content")
    return tokens
