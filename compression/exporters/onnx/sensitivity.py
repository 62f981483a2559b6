"""What each linear's outputs lose when weights and inputs are held in 8 bits, on text.

The operators of onnxruntime are imitated in float32: the same codes for weights, the same codes for inputs, so that the
choice between them is made before a graph exists. `tests/compression/exporters/test_onnx_codes.py` compares them with
the operators themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compression.core.blockwise import run_block_
from compression.core.streamed_model import StreamedModel
from compression.exporters.onnx.codes import Coding, decoded, encode

CHUNK_TOKENS = 512  # of a prompt that are read at once when it is served: what one scale then covers


@dataclass
class Loss:
    """Squared norms of a linear's outputs and, by coding, of their errors; relative errors of its weight."""

    shape: tuple[int, ...] = ()
    outputs: float = 0.0
    errors: dict[Coding, float] = field(default_factory=dict)
    weight_errors: dict[Coding, float] = field(default_factory=dict)

    def relative(self, coding: Coding) -> float:
        """‖y − ŷ‖/‖y‖."""
        return float((self.errors[coding] / max(self.outputs, 1e-300)) ** 0.5)


@torch.inference_mode()
def measure(model: StreamedModel, tokens: Tensor, codings: Sequence[Coding], head: Coding) -> dict[str, Loss]:
    """Walk the model over text and measure every linear, the head too.

    Args:
        model: in float32, block by block.
        tokens: `[windows, tokens]`.
        codings: that are tried for the blocks' linears.
        head: that of the head.

    Returns:
        By the linears' full names; the head under its own.
    """
    losses: dict[str, Loss] = {}
    hidden = model.embed(tokens)
    for index in range(model.blocks):
        block = model.block(index, model.block_state(index))
        prefix = model.family.block_prefix(index)
        handles = [
            module.register_forward_pre_hook(_Watch(losses.setdefault(prefix + name, Loss()), codings))
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        for row in range(len(hidden)):
            hidden[row : row + 1] = model.forward(block, hidden[row : row + 1], index)
        for handle in handles:
            handle.remove()
    with model.head() as (norm, linear, _):
        watch = _Watch(losses.setdefault(model.family.head, Loss()), [head])
        for row in hidden:
            watch(linear, (norm(row)[None],))
    return losses


class _Watch:
    """A hook that adds up what a linear loses on the inputs it is given."""

    def __init__(self, loss: Loss, codings: Sequence[Coding]) -> None:
        self.loss, self.codings = loss, codings
        self._weights: dict[Coding, Tensor] = {}

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.loss.shape = tuple(weight.shape)
        rows = inputs[0].reshape(-1, weight.shape[1])
        for start in range(0, len(rows), CHUNK_TOKENS):
            self._add(weight, rows[start : start + CHUNK_TOKENS])

    def _add(self, weight: Tensor, rows: Tensor) -> None:
        exact = rows @ weight.T
        self.loss.outputs += float(exact.square().sum(dtype=torch.float64))
        for coding in self.codings:
            if coding not in self._weights:
                self._weights[coding] = decoded(encode(weight, coding), coding, weight.shape[1])
                lost = torch.linalg.vector_norm(self._weights[coding] - weight)
                self.loss.weight_errors[coding] = float(lost / torch.linalg.vector_norm(weight).clamp_min(1e-30))
            error = coded_inputs(rows, coding) @ self._weights[coding].T - exact
            before = self.loss.errors.get(coding, 0.0)
            self.loss.errors[coding] = before + float(error.square().sum(dtype=torch.float64))


@torch.inference_mode()
def final_logits(model: StreamedModel, tokens: Tensor) -> Iterator[Tensor]:
    """Logits `[tokens, vocabulary]` of each of the windows `[windows, tokens]`, block by block in float32."""
    hidden = model.embed(tokens)
    for index in range(model.blocks):
        run_block_(model, model.block(index, model.block_state(index)), index, hidden)
    with model.head() as head:
        for row in hidden:
            yield head(row)


def coded_inputs(rows: Tensor, coding: Coding) -> Tensor:
    """What an operator makes of its inputs `[tokens, in]` before it multiplies.

    `dynamic`: 256 steps between the smallest and the largest input of all tokens, zero among them. `blocks`: 255 steps
    about zero for each token's block of adjacent inputs.
    """
    if coding.kind == "float32":
        return rows
    if coding.kind == "dynamic":
        low, high = rows.amin().clamp_max(0), rows.amax().clamp_min(0)
        scale = (high - low) / 255
        scale = scale if scale > 0 else torch.ones_like(scale)
        offset = (-low / scale).round().clamp(0, 255)
        return (((rows / scale).round() + offset).clamp(0, 255) - offset) * scale
    grouped = pad(rows, (0, -rows.shape[1] % coding.block)).unflatten(1, (-1, coding.block))
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return ((grouped / scales).round() * scales).flatten(1)[:, : rows.shape[1]]
