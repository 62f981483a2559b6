"""What makes a vision-language model's inputs of text and images, or why there is nothing that does."""

from dataclasses import dataclass
from typing import Any

from api_schemas.errors import InvalidCheckpoint, InvalidRequest
from compression.core.processors import still_processor
from preflight.vision import has_processor
from workers.inference.registry import ModelSource


@dataclass(frozen=True)
class NoProcessor:
    """Why a model with a vision tower is served as a text model here; a user sees it who sends an image."""

    code: str
    message: str

    def refusal(self, place: str) -> InvalidRequest:
        """Return the error for an image at this place of a request."""
        return InvalidRequest(self.code, self.message, place)


def load_processor(source: ModelSource, tokenizer: Any) -> Any | NoProcessor:
    """Return a model folder's processor of text and images, or why it has none that can be used here.

    Raises:
        InvalidCheckpoint: `processor_load_failed`: the folder describes a processor, and wrongly.
    """
    if not has_processor([path.name for path in source.folder.iterdir()]):
        message = (
            f"model '{source.id}' has no processor_config.json or preprocessor_config.json, so it cannot read images; "
            "push its processor's files, or send text"
        )
        return NoProcessor("processor_missing", message)
    try:
        return still_processor(source.folder, tokenizer)
    except Exception as error:  # transformers names no common base for what a damaged folder can raise
        if "torchvision" in str(error):
            message = (
                f"the processor of '{source.id}' exists for torchvision alone, which is not installed here; "
                "pip install torchvision beside torch, or send text"
            )
            return NoProcessor("processor_needs_torchvision", message)
        message = f"the processor of '{source.id}' cannot be loaded: {type(error).__name__}: {error}; push it again"
        raise InvalidCheckpoint("processor_load_failed", message, "model") from error
