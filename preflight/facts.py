"""The single facts of a checkpoint, its blockers and its warnings."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from api_schemas.plans import Blocker, ModelPart
from preflight.composites import TEXT, Placed
from preflight.families import Family, known_decoders, resolve, table
from preflight.safetensors_header import TensorEntry
from preflight.strict_json import shown, shown_list
from preflight.tensor_check import (
    FLOATING,
    KEPT,
    Tensors,
    architecture_of,
    head_is_copy,
    stored_head,
    unexpected_tensors,
)
from preflight.tokenizer_files import TokenizerFacts
from preflight.vision import VISION_PART, text_config

ANY_BLOCK = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")


def whole_number(value: Any) -> int | None:
    """A positive integer of a configuration, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def blocks_of(family: Family | None, config: Mapping[str, Any]) -> int:
    """The number of decoder blocks, 0 where it is not known."""
    return family.block_count(config) if family else whole_number(text_config(config).get("num_hidden_layers")) or 0


def block_parameters(family: Family | None, tensors: Tensors) -> int:
    """The number of parameters inside decoder blocks; by their usual names where the family is not known."""
    if family is not None:
        return sum(entry.parameters for name, entry in tensors.items() if name.startswith(family.blocks + "."))
    blocks = {name: entry for name, entry in tensors.items() if ANY_BLOCK.search(name)}
    return sum(entry.parameters for name, entry in blocks.items() if not VISION_PART.search(name))


def count_parts(placed: Placed | None, counted: Sequence[TensorEntry]) -> tuple[ModelPart, ...]:
    """The sizes of the parts of a checkpoint that has several.

    Args:
        placed: the decoder among them; None where the checkpoint is a decoder alone, which has no parts.
        counted: all tensors, a head that is a copy of the embedding left out.
    """
    if placed is None:
        return ()
    outside = {id(entry) for entry in placed.others.values()}
    parts = {"language": [entry for entry in counted if id(entry) not in outside], **placed.others_by_part()}
    return tuple(
        ModelPart.model_validate(
            {
                "name": name,
                "parameters": sum(entry.parameters for entry in entries),
                "bytes": sum(entry.bytes for entry in entries),
            }
        )
        for name, entries in sorted(parts.items())
    )


def part_blockers(placed: Placed | None, config: Mapping[str, Any]) -> tuple[Blocker, ...]:
    """Why a checkpoint of several parts could not be written again as it is, or a part stand alone."""
    if placed is None:
        kind = config.get("model_type")
        if kind not in known_decoders() or table(str(kind)).alone:
            return ()
        message = f"config.json: model_type {shown(kind)} is only known inside a vision-language model; push the whole"
        return (Blocker(code="unsupported_architecture", message=message, param="model_type"),)
    found = []
    named, wanted = architecture_of(placed.whole), placed.composite.architecture
    if named not in ("", wanted):
        message = f"config.json: architecture {shown(named)}; a {placed.composite.model_type} is loaded as {wanted}"
        found.append(Blocker(code="unsupported_architecture", message=message, param="architectures"))
    kind = placed.view["model_type"]
    if kind in known_decoders() and kind not in placed.composite.decoders:
        message = (
            f"config.json: {TEXT}.model_type {shown(kind)} inside a {placed.composite.model_type}; only "
            f"{', '.join(placed.composite.decoders)} can be compressed there"
        )
        found.append(Blocker(code="unsupported_architecture", message=message, param=f"{TEXT}.model_type"))
    odd = [name for name, entry in placed.others.items() if entry.dtype not in KEPT]
    if odd:
        message = (
            f"{shown_list(odd)} is stored as {placed.others[odd[0]].dtype}; parts must be {', '.join(sorted(KEPT))}"
        )
        found.append(Blocker(code="unsupported_dtype", message=message, param=odd[0][:512]))
    return tuple(found)


def find_blockers(config: Mapping[str, Any], tensors: Tensors, tokenizer: TokenizerFacts) -> tuple[Blocker, ...]:
    """Return every reason why no recipe could run on this checkpoint."""
    found = [
        *_architecture_blockers(config),
        *_tensor_blockers(config, tensors),
        *_tokenizer_blockers(config, tokenizer),
    ]
    return tuple(found)


def _architecture_blockers(config: Mapping[str, Any]) -> list[Blocker]:
    found = []
    try:
        family = resolve(config)
    except InvalidCheckpoint as error:
        found.append(Blocker(code=error.code, message=error.message, param=error.param))
    else:
        named = architecture_of(config)
        if named not in ("", family.architecture):
            message = f"config.json: architecture {shown(named)}; only {family.architecture} can be compressed"
            found.append(Blocker(code="unsupported_architecture", message=message, param="architectures"))
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        message = f"the weights are quantised already ({shown(method)}); push the original in 16 or 32 bits"
        found.append(Blocker(code="already_quantized", message=message, param="quantization_config"))
    return found


def _tensor_blockers(config: Mapping[str, Any], tensors: Tensors) -> list[Blocker]:
    found = []
    unexpected, buffers = unexpected_tensors(config, tensors)
    if unexpected:
        message = f"the architecture has no place for {shown_list(unexpected)}; they would be lost"
        found.append(Blocker(code="unexpected_tensor", message=message, param=unexpected[0][:512]))
    odd = [name for name, entry in tensors.items() if entry.dtype not in FLOATING and name not in buffers]
    if odd:
        message = (
            f"{shown_list(odd)} is stored as {tensors[odd[0]].dtype}; weights must be {', '.join(sorted(FLOATING))}"
        )
        found.append(Blocker(code="unsupported_dtype", message=message, param=odd[0][:512]))
    return found


def _tokenizer_blockers(config: Mapping[str, Any], tokenizer: TokenizerFacts) -> list[Blocker]:
    if not tokenizer.present:
        message = "no tokenizer.json, tokenizer.model or vocab.json with merges.txt: nothing can be calibrated; push it"
        return [Blocker(code="tokenizer_missing", message=message, param="tokenizer.json")]
    vocabulary = whole_number(config.get("vocab_size"))
    if vocabulary is not None and tokenizer.largest_id is not None and tokenizer.largest_id >= vocabulary:
        message = f"tokenizer.json has token {tokenizer.largest_id}, but vocab_size is {vocabulary}; they do not match"
        return [Blocker(code="tokenizer_mismatch", message=message, param="tokenizer.json")]
    return []


def find_warnings(config: Mapping[str, Any], tensors: Tensors, tokenizer: TokenizerFacts) -> tuple[str, ...]:
    """Return what does not stand in the way but should be known."""
    found = []
    if tokenizer.present and not tokenizer.has_chat_template:
        found.append("the tokenizer has no chat template: chat will be refused, plain completions work")
    head = stored_head(config, tensors)
    if head is not None:
        what = (
            "a copy of the embedding: it is counted and kept once"
            if head_is_copy(config, tensors)
            else "another matrix than the embedding: the head is kept and the tie is not"
        )
        found.append(f"tie_word_embeddings is true, yet {head} is stored and is {what}")
    buffers = unexpected_tensors(config, tensors)[1]
    if buffers:
        found.append(f"old buffers that every loader recomputes are left aside: {shown_list(buffers)}")
    dtypes = sorted({entry.dtype for entry in tensors.values()})
    if len(dtypes) > 1:
        found.append(f"the tensors have several dtypes: {', '.join(dtypes)}")
    return tuple(found)
