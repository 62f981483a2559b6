"""What a composite's decoder is told of an image: its own processor and tower run, up to the first block.

Only the tower, the projector, the embeddings and one block are loaded, whatever the depth, and nothing after the first
block's input is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from api_schemas.errors import InvalidCalibration
from compression.core.picture_rows import ROLE, PictureRow
from compression.core.processors import still_processor
from preflight.composite_rows import Composite


@dataclass(frozen=True)
class Encoded:
    """One row as its decoder is told it.

    Attributes:
        tokens: ids, the image's places among them.
        places: places of the image's tokens, ascending.
        states: `[len(places), hidden]` float32 inputs of block 0 at these places.
    """

    tokens: list[int]
    places: list[int]
    states: Tensor


class _Told(Exception):
    """Ends the forward pass at block 0; never leaves this file."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _processor(folder: Path) -> Any:
    """The model's own processor of text and images."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        processor: Any = still_processor(folder, tokenizer)
        if not hasattr(processor, "image_token"):
            raise ValueError(f"a {type(processor).__name__} knows no image token")
    except (ImportError, OSError, ValueError) as error:
        raise InvalidCalibration(
            "processor_unavailable",
            f"calibration.image_field: {folder.name} has no processor that can be loaded ({_first_line(error)}); "
            "install what it asks for, push its files, or calibrate on text alone",
            "calibration.image_field",
        ) from error
    return processor


class PictureEncoder:
    """Processor, tower and projector of one composite."""

    def __init__(self, folder: Path, composite: Composite) -> None:
        """Load what stands before the decoder.

        Raises:
            InvalidCalibration: `processor_unavailable` when the processor needs what is not here.
        """
        self.processor: Any = _processor(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.text_config.num_hidden_layers = 1
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:1]
        with _quietly():  # the loader would list every tensor of the other blocks
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).eval()
        self._first: nn.Module = self.model.get_submodule(f"{composite.decoder_in_memory}.layers.0")
        self.image_token_id = int(config.image_token_id)

    @torch.inference_mode()
    def encode(self, row: PictureRow) -> Encoded:
        """Tokens of a row with an image, and what that became; an image that the text does not place stands before it.

        Raises:
            InvalidCalibration: `bad_row` when text and image do not belong together for this processor.
        """
        token = self.processor.image_token
        text = row.text if token in row.text else token + row.text
        try:
            inputs = self.processor(images=[row.image], text=[text], add_special_tokens=False, return_tensors="pt")
            told = self._told(inputs)
        except (ValueError, IndexError, TypeError) as error:
            raise InvalidCalibration(
                "bad_row", f"{row.where}: text and image do not suit the model ({_first_line(error)}); mend it", ROLE
            ) from error
        tokens = inputs["input_ids"][0]
        marked = tokens == self.image_token_id
        return Encoded(tokens.tolist(), marked.nonzero()[:, 0].tolist(), told[marked])

    def _told(self, inputs: Any) -> Tensor:
        """Inputs of block 0, `[tokens, hidden]`."""

        def stop(_module: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            raise _Told(positional[0] if positional else named["hidden_states"])

        handle = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _Told as told:
            return told.hidden[0].float()
        finally:
            handle.remove()
        raise RuntimeError("the model ran without its first block")


@contextmanager
def _quietly() -> Iterator[None]:
    """Let transformers speak of errors alone for a while."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
