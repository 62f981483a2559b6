"""mPLUG-2: a clip (or an image) becomes a caption, or with a question an answer.

A video tower reads the frames, two layers of the text encoder gather what they show, and a BERT decoder writes. For
questions the text encoder reads the question, fusion layers let it look at the frames, and the decoder reads both.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from compression.runtime.beam_search import BeamSettings, beam_search
from compression.runtime.mplug2_layers import Reader, ReadingLayer
from compression.runtime.video_former import VideoFormer

MODEL_TYPE = "modepress_mplug2"
TASKS = ("caption", "question")
EPS = 1e-12
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class MPlug2Config(PreTrainedConfig):
    """Sizes of the parts, and how answers are searched."""

    model_type = MODEL_TYPE

    task: str = "caption"
    vision: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    fusion_layers: int = 0
    decoder: dict[str, Any] | None = None
    frames: int = 16
    beams: dict[str, Any] | None = None
    prompt: str = ""
    tie_word_embeddings: bool = True


class MPlug2ForVideoText(PreTrainedModel):
    """Frames, and for task `question` a question, to text."""

    config_class = MPlug2Config
    base_model_prefix = ""
    _supports_sdpa = True
    _tied_weights_keys = {  # noqa: RUF012 (as in the library)
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
    }

    def __init__(self, config: Any) -> None:
        """Build the parts that the task needs.

        Raises:
            ValueError: `task` is none that is known.
        """
        super().__init__(config)
        if config.task not in TASKS:
            raise ValueError(f"task is {config.task!r}; known are {', '.join(TASKS)}")
        text, width = config.text, config.vision["width"]
        self.vision = VideoFormer(config.vision)
        self.widened = width != text["width"]
        if self.widened:
            self.vision_linear = nn.Linear(width, text["width"])
            self.vision_linear_norm = nn.LayerNorm(text["width"], eps=EPS)
        self.reader = Reader(text, reads_text=config.task == "question")
        self.vision_norm = nn.LayerNorm(text["width"], eps=EPS)
        fused = config.fusion_layers if config.task == "question" else 0
        self.fusion = nn.ModuleList(ReadingLayer(text, crossing=True) for _ in range(fused))
        self.text_decoder = BertLMHeadModel(BertConfig(**config.decoder, is_decoder=True, add_cross_attention=True))
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The decoder's token embeddings."""
        return self.text_decoder.get_input_embeddings()

    def see(self, pixels: Tensor) -> Tensor:
        """Map frames `[clips, 3, frames, image, image]` to what the decoder reads of them, `[clips, tokens, width]`."""
        vision = self.vision(pixels)
        if self.widened:
            vision = self.vision_linear_norm(self.vision_linear(vision))
        result: Tensor = self.vision_norm(vision + self.reader.read_vision(vision))
        return result

    def remember(
        self, pixels: Tensor, question: Tensor | None = None, question_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the decoder looks at while it writes, `[clips, length, width]`, and its mask `[clips, length]`.

        Args:
            pixels: `[clips, 3, frames, image, image]`.
            question: ids `[clips, tokens]`; for task `question` alone.
            question_mask: `[clips, tokens]`, 1 where a token is; default: everywhere.

        Raises:
            ValueError: a question is missing, or given to a checkpoint for captions.
        """
        if (question is None) == (self.config.task == "question"):
            raise ValueError(f"task {self.config.task!r} {'needs a question' if question is None else 'takes none'}")
        seen = self.see(pixels)
        mask = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        if question is None:
            return seen, mask
        kept = torch.ones_like(question) if question_mask is None else question_mask
        visible = kept[:, None, None, :].bool()
        states = self.reader.read_text(question, visible)
        for layer in self.fusion:
            states = layer(states, seen, visible)
        return torch.cat((seen, states), dim=1), torch.cat((mask, kept), dim=1)

    def forward(
        self,
        pixel_values: Tensor,
        decoder_input_ids: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits of every position of `decoder_input_ids` `[clips, tokens]`.

        Args:
            pixel_values: `[clips, 3, frames, image, image]`.
            decoder_input_ids: what was written so far, from the start token on.
            input_ids: the question's, for task `question`.
            attention_mask: of the question.
        """
        memory, mask = self.remember(pixel_values, input_ids, attention_mask)
        output: CausalLMOutputWithCrossAttentions = self.text_decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
        )
        return output

    @torch.inference_mode()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        settings: BeamSettings | None = None,
    ) -> list[list[tuple[float, list[int]]]]:
        """Search answers for each clip: their scores and tokens, best first. Keys and values are kept between tokens.

        Args:
            pixel_values: `[clips, 3, frames, image, image]`.
            input_ids: the question's, for task `question`.
            attention_mask: of the question.
            settings: default: those of the configuration.
        """
        memory, mask = self.remember(pixel_values, input_ids, attention_mask)
        chosen = settings or BeamSettings(**self.config.beams)
        return [
            beam_search(_CachedSteps(self.text_decoder, one[None], kept[None], chosen.beams), chosen)
            for one, kept in zip(memory, mask, strict=True)
        ]


class _CachedSteps:
    """The decoder, one token per beam at a time, with the keys and values of the tokens before."""

    def __init__(self, decoder: Any, memory: Tensor, mask: Tensor, beams: int) -> None:
        self._decoder = decoder
        self._seen = {
            "encoder_hidden_states": memory.expand(beams, -1, -1),
            "encoder_attention_mask": mask.expand(beams, -1),
        }
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def __call__(self, tokens: Tensor, parents: Tensor) -> Tensor:
        device = self._decoder.device
        if self._cache.get_seq_length():
            self._cache.reorder_cache(parents.to(device))
        output = self._decoder(input_ids=tokens[:, None].to(device), cache=self._cache, use_cache=True, **self._seen)
        logits: Tensor = output.logits[:, -1]
        return logits


def frame_numbers(length: int, frames: int) -> list[int]:
    """Which of `length` frames are read: the middle of each of `frames` equal spans, the last one again if too few."""
    count = min(frames, length)
    edges = [index * length // count for index in range(count + 1)]
    middles = [(first + after - 1) // 2 for first, after in pairwise(edges)]
    return middles + middles[-1:] * (frames - count)


def frame_pixels(frames: Sequence[Tensor], config: Any) -> Tensor:
    """Make what the model reads of a clip, or of one image.

    Args:
        frames: each `[height, width, 3]`, bytes; all of a clip in order, or one image.
        config: of the model.

    Returns:
        `[1, 3, frames, image, image]`: frames squeezed to a square by nearest neighbours, as the authors' evaluation
        does, and normed by CLIP's mean and deviation.
    """
    size = config.vision["image"]
    chosen = [frames[number] for number in frame_numbers(len(frames), config.frames)]
    squares = [
        functional.interpolate(one.permute(2, 0, 1)[None].float(), size=(size, size), mode="nearest") for one in chosen
    ]
    clip = torch.stack(squares, dim=2) / 255.0
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (MEAN, DEVIATION))
    return (clip - mean) / deviation


def register() -> None:
    """Make the Auto classes know it; safe to call twice."""
    AutoConfig.register(MODEL_TYPE, MPlug2Config, exist_ok=True)
    AutoModel.register(MPlug2Config, MPlug2ForVideoText, exist_ok=True)
    AutoModelForImageTextToText.register(MPlug2Config, MPlug2ForVideoText, exist_ok=True)


def empty_model(config: MPlug2Config) -> MPlug2ForVideoText:
    """The model without memory for its weights: names and shapes alone."""
    with torch.device("meta"):
        return MPlug2ForVideoText(config)
