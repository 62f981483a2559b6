"""Does an imported decoder still know language? Its loss on plain text, read block by block, says at once.

A base of another version, rows in another order or norms of another stage give a model whose every tensor has the right
shape and whose answers are noise ("the the the"). Its loss on English text is then about that of guessing.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from compression.core.streamed_model import StreamedModel
from compression.importers.ledger import FILE
from compression.importers.writing import write_json
from preflight.checkpoint import open_checkpoint
from preflight.families import known_decoders, resolve

TEXT = (
    "The old harbour lies below the town, and in the morning the boats come back with the night's fish. Children wait "
    "on the wall to see what their fathers have brought. When the nets are empty, nobody talks much; when they are "
    "full, there is bread, wine and music until the evening. Then the lamps are lit, the tide turns, and the boats go "
    "out again."
)
TOKENS = 96
NOISE = 0.6  # of the loss of guessing; SmolLM2-135M-Instruct loses 3.42 nats of 10.80 on this text


@torch.inference_mode()
def text_loss(folder: Path) -> float:
    """Mean loss in nats per token of an English text under a model folder's decoder, one block in memory at a time."""
    decoder = open_checkpoint(folder).decoder
    model = StreamedModel(folder, resolve(decoder.config), decoder.tensors)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"][:TOKENS]])
    hidden = model.embed(tokens)
    for index in range(model.blocks):
        hidden = model.forward(model.block(index, model.block_state(index)), hidden, index)
    with model.head() as head:
        logits = head(hidden[0])
    return float(nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]))


def noise_warning(loss: float, vocabulary: int) -> str | None:
    """What to say of a loss near that of guessing among `vocabulary` tokens; None where language is known."""
    guessing = math.log(vocabulary)
    if loss < NOISE * guessing:
        return None
    return (
        f"answers_like_noise: on plain English text the imported decoder loses {loss:.2f} nats per token, and guessing "
        f"{guessing:.2f}; files of different versions are mixed (another release of the language model, or another "
        "stage's file), or its text is not English"
    )


def with_text_loss(folder: Path, record: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Add to the record what the finished decoder makes of plain text, and write it; return the whole.

    A decoder of a family without a table is not walked, and the record says so.
    """
    if open_checkpoint(folder).decoder.config.get("model_type") not in known_decoders():
        found: dict[str, Any] = {"text_loss": None}
    else:
        loss = text_loss(folder)
        warning = noise_warning(loss, vocabulary)
        warnings = [*record.get("warnings", []), *([warning] if warning else [])]
        found = {"text_loss": {"nats_per_token": loss, "guessing": math.log(vocabulary)}, "warnings": warnings}
    whole = {**record, **found}
    write_json(folder / FILE, whole)
    return whole
