"""Imports TableGPT2: the decoder that its authors released, or decoder, table encoder and projector.

A published folder holds config.json, tokenizer files and the weights: safetensors, one pickle, or three (`decoder.bin`,
`encoder.bin`, `projector.bin`, without prefixes). Two encoders were published: over cells, and over Markdown.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2ForCausalLM

from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import TableGpt2Import
from compression.importers.ledger import Key, Ledger, shapes_of
from compression.importers.sanity import with_text_loss
from compression.importers.sources import PICKLED, Source, open_source
from compression.importers.tablegpt2_config import (
    CELL_TYPES,
    DECODER,
    MARKUP_GROUPS,
    MARKUP_TYPES,
    decoder_config,
    read_config,
    table_rule,
    whole_config,
)
from compression.importers.tablegpt2_names import published_name
from compression.importers.writing import new_folder, write_json, write_weights
from compression.runtime.tablegpt2 import empty_model
from preflight.checkpoint import open_checkpoint
from preflight.tables import RULE_FILE, TOKENIZER_FILE

NAME = "tablegpt2"
WHOLE, PARTS = "model", ("decoder", "encoder", "projector")
RULES = {
    "contrastive_head": "scores columns in the encoder's own training; nothing reads it afterwards",
    "unused_pooler": "of the sentence encoder; cells are the mean of their tokens",
    "positions": "counts 0, 1, 2, … which the model makes itself",
    "causal_mask": "of a decoder; the table encoder sees both ways and never reads it",
    "rotary_table": "a table of angles which the model makes itself",
    "tied_head": "the embedding once more; the configuration ties the two",
}
DROPPED = (
    ("contrastive_head", r"encoder\.col_specific_projection_head\..*"),
    ("unused_pooler", r"encoder\.st\.pooler\..*"),
    ("positions", r"encoder\.st\.embeddings\.position_ids"),
    ("causal_mask", r"encoder\.h\.\d+\.attn\.causal_mask"),
    ("rotary_table", r"(decoder\.)?model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def convert(request: TableGpt2Import, target: Path) -> dict[str, Any]:
    """Write the model folder `target`, which must not exist; return the record of the import that lies in it.

    Raises:
        NotFound: `file_not_found`.
        InvalidCheckpoint: what `read_config`, `open_source` and `Ledger.balance` raise; `two_layouts`,
            `table_tokenizer_missing`, `chat_template_missing`.
        Conflict: `target_exists`.
    """
    folder = Path(request.folder)
    config = read_config(folder)
    sources = _open(folder, config)
    ledger, made, targets = _balanced(config, sources)
    with new_folder(target) as unfinished:
        made.save_pretrained(unfinished)
        _copy_side_files(folder, unfinished, config)
        write_json(unfinished / RULE_FILE, table_rule(config).model_dump(mode="json", exclude_defaults=True))
        record = write_weights(ledger, targets, unfinished, _dtypes(ledger), notes=_notes(ledger, config, made))
        _check_chat(unfinished)
        return with_text_loss(unfinished, record, made.get_text_config().vocab_size)


def _open(folder: Path, config: Mapping[str, Any]) -> dict[str, Source]:
    """The sources by role: one for all, or one per part."""
    if config["model_type"] == DECODER:
        return {WHOLE: open_source(folder, WHOLE)}
    parts = [part for part in PARTS if (folder / f"{part}.bin").is_file()]
    files = sorted(path.name for path in folder.iterdir())
    whole = [name for name in files if name.endswith(".safetensors") or name.startswith(PICKLED.removesuffix(".bin"))]
    if parts and whole:
        message = f"{folder.name} has {whole[0]} and {parts[0]}.bin; remove one, so that there is one set of weights"
        raise InvalidCheckpoint("two_layouts", message, f"{parts[0]}.bin")
    if parts:
        return {part: open_source(folder / f"{part}.bin", part) for part in PARTS}
    return {WHOLE: open_source(folder, WHOLE)}


def _balanced(
    config: Mapping[str, Any], sources: Mapping[str, Source]
) -> tuple[Ledger, PreTrainedConfig, dict[str, tuple[int, ...]]]:
    """The account of an import, complete, with the result's configuration and tensors."""
    ledger = Ledger(NAME, sources, RULES)
    if config["model_type"] == DECODER:
        made: Any = decoder_config(config)
        with torch.device("meta"):
            model: Any = Qwen2ForCausalLM(made)
    else:
        made = whole_config(config, _summary_width(config, sources))
        model = empty_model(made)
    targets = shapes_of(model.state_dict().items())
    if made.tie_word_embeddings:
        targets = {name: shape for name, shape in targets.items() if not name.endswith("lm_head.weight")}
    if config["model_type"] == DECODER:
        _use_decoder(ledger, targets)
    else:
        _use_whole(ledger, targets, made)
    if made.tie_word_embeddings:
        _check_tied_head(ledger, "" if config["model_type"] == DECODER else "decoder.")
    _drop(ledger, sources, tied=made.tie_word_embeddings)
    ledger.balance(targets)
    return ledger, made, targets


def _drop(ledger: Ledger, sources: Mapping[str, Source], *, tied: bool) -> None:
    rules = [*DROPPED, *([("tied_head", r"(decoder\.)?lm_head\.weight")] if tied else [])]
    for role in sources:
        prefix = "" if role == WHOLE else f"{role}."
        for rule, pattern in rules:
            ledger.drop(role, rule, partial(_matches, pattern, prefix))


def _check_tied_head(ledger: Ledger, prefix: str) -> None:
    """Refuse a head that would be dropped as a copy and is none."""
    head, embedding = (_key(ledger, prefix + name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    source = ledger.sources[head.role]
    if head.name not in source.stored or embedding.name not in source.stored:
        return
    if not torch.equal(source.read(head.name), source.read(embedding.name)):
        message = f"{source.label}: {head.name} is not {embedding.name}, though tie_word_embeddings is true; correct it"
        raise InvalidCheckpoint("untied_head", message, head.name)


def _matches(pattern: str, prefix: str, name: str) -> bool:
    return re.fullmatch(pattern, prefix + name) is not None


def _key(ledger: Ledger, name: str) -> Key:
    """The place of a published tensor, in one set of weights or in three."""
    if WHOLE in ledger.sources:
        return Key(WHOLE, name)
    part, _, inner = name.partition(".")
    return Key(part, inner)


def _summary_width(config: Mapping[str, Any], sources: Mapping[str, Source]) -> int:
    if config["model_type"] in MARKUP_TYPES:
        return 0
    key = _key(Ledger(NAME, sources, RULES), "encoder.qformer.q")
    source = sources[key.role]
    if key.name not in source.stored:
        message = (
            f"{source.label} has no {key.name!r}; give weights with the table encoder, or the decoder's own folder"
        )
        raise InvalidCheckpoint("missing_tensor", message, key.name)
    return source.shape(key.name)[-1]


def _use_decoder(ledger: Ledger, targets: Mapping[str, Any]) -> None:
    for target in targets:
        ledger.use(target, Key(WHOLE, target))


def _use_whole(ledger: Ledger, targets: Mapping[str, Any], made: Any) -> None:
    settings = made.table_encoder
    special = _summary(ledger, settings) if settings["kind"] == "cells" else {}
    for target in targets:
        if target in special:
            special[target](target)
        elif target.startswith("table_encoder.blocks.") and target.split(".")[3] in ("query", "key", "value"):
            _use_interleaved(ledger, target)
        else:
            ledger.use(target, _key(ledger, published_name(target, settings["kind"])))


def _use_interleaved(ledger: Ledger, target: str) -> None:
    """One of query, value and key, which the public weights hold as groups of [query | value | key] rows."""
    index, part = target.split(".")[2:4]
    place = ("query", "value", "key").index(part)

    def build(fused: Tensor) -> Tensor:
        return fused.unflatten(0, (MARKUP_GROUPS, 3, -1))[:, place].flatten(0, 1)

    key = _key(ledger, f"encoder.h.{index}.attn.qkv_proj.weight")
    ledger.use(target, key, how=f"the rows of the {part} in each of {MARKUP_GROUPS} groups", build=build)


def _summary(ledger: Ledger, settings: Mapping[str, Any]) -> dict[str, Callable[[str], None]]:
    """What the queries and their keys are folded into, and the values beside them."""
    width, head_dim = settings["width"], settings["summary_head_dim"]
    heads = width // head_dim
    queries, both = _key(ledger, "encoder.qformer.q"), _key(ledger, "encoder.qformer.to_kv.weight")

    def scores(query: Tensor, key_value: Tensor) -> Tensor:
        key = key_value[:width].double().unflatten(0, (heads, head_dim))
        folded = torch.einsum("qhd,hdc->hqc", query.double().unflatten(1, (heads, head_dim)), key)
        return (folded * head_dim**-0.5).flatten(0, 1).to(key_value.dtype)

    def use_scores(target: str) -> None:
        ledger.use(target, queries, both, how="each head's keys, times its queries, over √head_dim", build=scores)

    def use_values(target: str) -> None:
        ledger.use(target, both, how="the second half: values", build=lambda key_value: key_value[width:])

    return {"table_encoder.summary.score.weight": use_scores, "table_encoder.summary.value.weight": use_values}


def _notes(ledger: Ledger, config: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """What the record says beside the account: which of the published models this is, and what became smaller."""
    found = [{"what": rule, "bytes": size} for rule, size in ledger.dropped_bytes().items() if size]
    if config["model_type"] == DECODER:
        return {"variant": "decoder only", "savings": found}
    settings = made.table_encoder
    if settings["kind"] == "markup":
        return {"variant": "with table encoder, over Markdown", "savings": found}
    query, both = (_key(ledger, f"encoder.qformer.{name}") for name in ("q", "to_kv.weight"))
    score = ledger.make("table_encoder.summary.score.weight")
    before = ledger.sources[query.role].bytes(query.name) + ledger.sources[both.role].bytes(both.name) // 2
    folded = before - score.numel() * score.element_size()
    rule = table_rule(config)
    return {
        "variant": "with table encoder, over cells",
        "savings": [*found, {"what": "queries_folded_into_keys", "bytes": folded}],
        "cells": f"encoded as they are; the original pads a table to {rule.rows} rows of {rule.columns} columns and "
        f"each cell to {rule.tokens} tokens",
    }


def _dtypes(ledger: Ledger) -> Callable[[str], torch.dtype]:
    """Every tensor keeps the dtype of what it is made of."""

    def dtype_of(target: str) -> torch.dtype:
        key = ledger.entries[target].keys[-1]
        return ledger.sources[key.role].meta(key.name).dtype

    return dtype_of


def _copy_side_files(folder: Path, unfinished: Path, config: Mapping[str, Any]) -> None:
    for name in SIDE_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, unfinished / name)
    if config["model_type"] not in (*CELL_TYPES, *MARKUP_TYPES):
        return
    where = str(config["encoder_config"].get("subfolder", "encoder"))
    path = folder / where / "tokenizer.json"
    if Path(where).name != where or not path.is_file():
        message = f"{folder.name} has no {where}/tokenizer.json, with which cells are read; give the complete folder"
        raise InvalidCheckpoint("table_tokenizer_missing", message, f"{where}/tokenizer.json")
    if path.is_symlink() or path.parent.is_symlink():
        message = f"{where}/tokenizer.json is a symbolic link, and what it names would be copied; put the file there"
        raise InvalidCheckpoint("symlink_refused", message, f"{where}/tokenizer.json")
    shutil.copyfile(path, unfinished / TOKENIZER_FILE)


def _check_chat(unfinished: Path) -> None:
    """Open the result once, and refuse what could not answer: newer servers have no template of their own."""
    tokenizer = open_checkpoint(unfinished).tokenizer
    if not tokenizer.has_chat_template:
        message = (
            "the folder has no chat template; TableGPT2's is in tokenizer_config.json of the authors' folder: give that"
        )
        raise InvalidCheckpoint("chat_template_missing", message, "tokenizer_config.json")
