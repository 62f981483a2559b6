"""From a conversation with images to what a vision-language model reads: by its own template and its own processor."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from api_schemas.errors import InvalidRequest
from api_schemas.inference import Message, TextPart
from workers.inference.images.reading import ImageFile
from workers.inference.loading import LoadedModel

NOT_TAKEN = ("input_ids", "attention_mask", "labels")  # a prompt of its own argument, unpadded, and not for training


def refuse_unreadable(loaded: LoadedModel, images: Sequence[ImageFile]) -> None:
    """Refuse images for a model that has no processor which could be used here.

    Raises:
        InvalidRequest: `processor_missing` or `processor_needs_torchvision`.
    """
    if images and loaded.no_processor is not None:
        raise loaded.no_processor.refusal(images[0].place)


def vision_template(loaded: LoadedModel) -> str | None:
    """Return the chat template of a model with a vision tower: its processor's, else its tokenizer's.

    None for a text model, and where there is no template.
    """
    if getattr(loaded.model.config, "vision_config", None) is None:
        return None
    template = getattr(loaded.processor, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template or (loaded.tokenizer.get_chat_template() if loaded.tokenizer.chat_template else None)


def places_images(template: str) -> bool:
    """Whether a template goes through parts of content: then text alone would be lost, else a list be printed."""
    return "image" in template


def content_parts(message: Message) -> list[dict[str, str]]:
    """Return a message's content as the list of parts that templates of vision-language models go through."""
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]


def standing_tokens(loaded: LoadedModel) -> frozenset[str]:
    """Return the tokens that stand for an image or a video in a model's prompts, as a text spells them."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    known = [tokenizer.convert_ids_to_tokens(token) for token in ids if isinstance(token, int)]
    named = [getattr(loaded.processor, name, None) for name in ("image_token", "video_token")]
    return frozenset(token for token in (*known, *named) if isinstance(token, str) and token)


def refuse_marks(loaded: LoadedModel, messages: Sequence[Message]) -> None:
    """Refuse text that spells a token which stands for an image: the model would look for one more.

    Raises:
        InvalidRequest: `image_token_in_text`.
    """
    for index, message in enumerate(messages):
        content = message.content
        texts = [content] if isinstance(content, str) else [p.text for p in content if isinstance(p, TextPart)]
        for mark in sorted(standing_tokens(loaded)):
            if any(mark in text for text in texts):
                raise _spelled(mark, f"messages.{index}.content")


def vision_inputs(loaded: LoadedModel, text: str, images: Sequence[ImageFile]) -> tuple[list[int], Mapping[str, Any]]:
    """Return the prompt's tokens, a run of them for each image, and what the model's forward takes beside them.

    Args:
        loaded: a model with a processor.
        text: the rendered conversation.
        images: in the order of their marks in the text.

    Raises:
        InvalidRequest: what decoding raises; `chat_template_without_images`, `image_not_processable`.
    """
    _check_marks(loaded, text, len(images))
    bos = loaded.tokenizer.bos_token  # added unless the template has written it, as transformers' own templates do
    options = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
    if not images:
        return list(loaded.tokenizer(text, **options)["input_ids"]), {}
    inputs = _process(loaded, text, [image.decode() for image in images], images[0].place, options)
    inputs = inputs.to(loaded.precision.device, dtype=loaded.model.dtype)
    pictures = {name: value for name, value in inputs.items() if name not in NOT_TAKEN}
    return [int(token) for token in inputs["input_ids"][0]], pictures


def _check_marks(loaded: LoadedModel, text: str, images: int) -> None:
    """Count once more in the whole text, where parts of messages stand side by side."""
    mark = getattr(loaded.processor, "image_token", None)
    if mark and text.count(mark) != images:
        message = (
            f"the chat template of '{loaded.source.id}' makes {text.count(mark)} of the {images} images visible; put "
            "images into user messages, or use a model whose template takes them"
        )
        raise InvalidRequest("chat_template_without_images", message, "messages")
    for other in sorted(standing_tokens(loaded) - {mark}):
        if other in text:
            raise _spelled(other, "messages")


def _spelled(mark: str, place: str) -> InvalidRequest:
    text = (
        f"{place} has the text {mark!r}, which stands for images or videos in this model's prompts; spell it otherwise"
    )
    return InvalidRequest("image_token_in_text", text, place)


def _process(
    loaded: LoadedModel, text: str, pictures: list[Image.Image], place: str, options: Mapping[str, Any]
) -> Any:
    try:
        return loaded.processor(text=[text], images=[pictures], return_tensors="pt", **options)
    except Exception as error:  # each family's processor has rules of its own, on sizes above all
        message = f"{place}: the model's image processor refuses it: {type(error).__name__}: {error}; send another size"
        raise InvalidRequest("image_not_processable", message, place) from error
