"""The token loop: read the prompt, then one token at a time with a key-value cache."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from api_schemas.errors import InvalidCheckpoint
from workers.inference.detokenizer import Detokenizer
from workers.inference.graphs import GraphDecoder, ServedGraph
from workers.inference.loading import LoadedModel
from workers.inference.logprobs import TokenScores
from workers.inference.sampling import Sampler, of_choice
from workers.inference.spelling import Spelling
from workers.inference.stops import StopFilter
from workers.inference.tasks import FinishReason, GenerationTask, Piece
from workers.inference.video_answers import searched

PREFILL_CHUNK = 512  # prompt tokens read between two looks at `cancelled`
CONTEXT_TAIL = 6  # prompt tokens that decide how the answer's first token is spaced


class _Decoder:
    """A model with the cache of one answer."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._cache = DynamicCache(config=loaded.model.config)
        for module in loaded.model.modules():
            if getattr(module, "rope_deltas", None) is not None:  # how far the last answer's images moved its positions
                module.rope_deltas = None

    def read(self, tokens: list[int], pictures: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Append tokens, with the pictures among them, and return the logits [vocabulary] after the last of them."""
        inputs: dict[str, Any] = {self._loaded.cache_argument: self._cache, **(pictures or {})}
        ids = torch.tensor([tokens], device=self._loaded.precision.device)
        output = self._loaded.model(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def copy(self) -> "_Decoder":
        """Return a decoder that goes on from the same place, with a cache of its own."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        return other


class Writer:
    """Turns the tokens of one answer into pieces of text."""

    def __init__(self, loaded: LoadedModel, task: GenerationTask, index: int = 0) -> None:
        context = task.prompt[-CONTEXT_TAIL:] if task.continues_prompt else ()
        self._detokenizer = Detokenizer(loaded.tokenizer, context)
        self._stops = StopFilter(task.stops)
        self._eos_ids = loaded.eos_ids
        self._max_tokens = task.max_tokens
        self._index = index
        self._count = 0
        self._scores = None if task.logprobs is None else TokenScores(Spelling(loaded.tokenizer), task.logprobs)

    def write(self, token: int, logits: torch.Tensor) -> Piece:
        """Return the piece of one more token; it carries the finish reason when the answer ends with it.

        Args:
            token: the token.
            logits: [vocabulary], as the model gave them.
        """
        self._count += 1
        if token in self._eos_ids:
            return self._last("", "stop")
        if self._scores is not None:
            self._scores.add(token, logits)
        readable = self._detokenizer.add(token)
        if self._scores is not None and readable:
            self._scores.complete(readable)
        text, stopped = self._stops.feed(readable)
        if stopped:
            return self._piece(text, "stop")
        if self._count == self._max_tokens:
            return self._last(text, "length")
        return self._piece(text)

    def _last(self, text: str, reason: FinishReason) -> Piece:
        readable = self._detokenizer.flush()
        if self._scores is not None:
            self._scores.complete(readable)
        rest, stopped = self._stops.feed(readable)
        if stopped:
            return self._piece(text + rest, "stop")
        return self._piece(text + rest + self._stops.flush(), reason)

    def _piece(self, text: str, reason: FinishReason | None = None) -> Piece:
        scores = () if self._scores is None else self._scores.release(text, ended=reason is not None)
        return Piece(text, self._count, reason, scores, self._index)


@torch.inference_mode()
def generate(loaded: LoadedModel, task: GenerationTask, cancelled: Callable[[], bool]) -> Iterator[Piece]:
    """Yield one piece per token, answer by answer; the last piece of each has a finish reason.

    The prompt is read once; each answer goes on from a copy of its cache. Ends early once `cancelled()` is true.

    Args:
        loaded: the model.
        task: prompt, limits and sampling.
        cancelled: asked between tokens and between chunks of a long prompt.

    Raises:
        InvalidCheckpoint: `model_output_not_finite`.
    """
    if loaded.searches:
        yield searched(loaded, task)
        return
    prompt = GraphDecoder(loaded.model) if isinstance(loaded.model, ServedGraph) else _Decoder(loaded)
    chunk = len(task.prompt) if task.pictures else PREFILL_CHUNK  # no cut may go through a picture
    for start in range(0, len(task.prompt), chunk):
        if cancelled():
            return
        logits = prompt.read(task.prompt[start : start + chunk], task.pictures)
    for index in range(task.choices):
        last = index == task.choices - 1  # no name for a copy: it goes before the next one is made
        yield from _answer(loaded, task, index, prompt if last else prompt.copy(), logits, cancelled)
        if cancelled():
            return


def _answer(
    loaded: LoadedModel,
    task: GenerationTask,
    index: int,
    decoder: _Decoder | GraphDecoder,
    logits: torch.Tensor,
    cancelled: Callable[[], bool],
) -> Iterator[Piece]:
    """Write the answer of this index behind the prompt that the decoder has read; `logits` follow the prompt."""
    writer = Writer(loaded, task, index)
    sampler = Sampler(of_choice(task.sampling, index), task.prompt, loaded.vocabulary)
    while True:
        _require_finite(loaded, logits)
        token = sampler.pick(logits)
        piece = writer.write(token, logits)
        yield piece
        if piece.finish_reason is not None or cancelled():
            return
        logits = decoder.read([token])


def _require_finite(loaded: LoadedModel, logits: torch.Tensor) -> None:
    """The largest logit is NaN where any is; an infinite one leaves no probabilities."""
    largest = float(logits.max())
    if not math.isfinite(largest):
        what = "NaN" if math.isnan(largest) else "infinite logits"
        message = f"model '{loaded.source.id}' computes {what}; its weights are damaged, so register sound ones"
        raise InvalidCheckpoint("model_output_not_finite", message, "model")
