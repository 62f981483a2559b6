"""The common course of an import around EVA ViT-g: open, account, write; complete or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import ImageChatImport
from compression.importers.blip2_parts import DELTA, Q_FORMER, RULES, VISION
from compression.importers.chat_files import STOP, write_chat_files
from compression.importers.ledger import Ledger, shapes_of
from compression.importers.sanity import with_text_loss
from compression.importers.sources import Source, open_source
from compression.importers.writing import new_folder, write_json, write_weights
from preflight.strict_json import read_object

LANGUAGE = "language"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Plan:
    """What a family has decided before anything is written.

    Attributes:
        ledger: with every entry and drop.
        config_class: of the whole.
        model_class: of the whole.
        settings: of the whole, but for tokens and dtype.
        template: of prompts.
        notes: for the record.
        warnings: what a user should know.
    """

    ledger: Ledger
    config_class: type[Any]
    model_class: type[Any]
    settings: dict[str, Any]
    template: str
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def open_sources(request: ImageChatImport, roles: tuple[str, ...]) -> dict[str, Source]:
    """Open what a request names, by role.

    Raises:
        NotFound, InvalidCheckpoint: as `open_source`.
    """
    return {role: open_source(Path(getattr(request, role)), role) for role in roles}


def new_ledger(request: ImageChatImport, family: str, rules: Mapping[str, str] | None = None) -> Ledger:
    """An empty account over the request's sources."""
    roles = tuple(role for role in (LANGUAGE, VISION, Q_FORMER, DELTA) if getattr(request, role, None))
    return Ledger(family, open_sources(request, roles), {**RULES, **(rules or {})})


def language_settings(request: ImageChatImport) -> dict[str, Any]:
    """The language model's config.json, or nothing where its weights came without one.

    Raises:
        InvalidCheckpoint: `invalid_config`.
    """
    path = Path(request.language)
    config = (path if path.is_dir() else path.parent) / "config.json"
    return read_object(config, "invalid_config") if config.is_file() else {}


def write_model(request: ImageChatImport, plan: Plan, target: Path) -> dict[str, Any]:
    """Balance the account, then write the model folder `target`; return the record that lies in it.

    Raises:
        InvalidCheckpoint: as `Ledger.balance`, `write_chat_files` and `write_weights`.
        Conflict: `target_exists`.
    """
    config = plan.config_class(**plan.settings, stop_strings=[STOP])
    with torch.device("meta"):
        model = plan.model_class(config)
    targets = shapes_of(model.state_dict().items())
    plan.ledger.balance(targets)
    dtype = _dtype(request, plan.ledger)
    path = Path(request.language)
    with new_folder(target) as folder:
        tokens = write_chat_files(
            folder,
            path if path.is_dir() else path.parent,
            plan.template,
            config.text_config.vocab_size,
            config.vision_config.image_size,
            inputs_per_image(config),
        )
        config.image_token_index = tokens.image
        config.text_config.bos_token_id, config.text_config.pad_token_id = tokens.begin, tokens.padding
        config.text_config.eos_token_id = tokens.ends[0] if tokens.ends else None
        config.architectures, config.dtype = [plan.model_class.__name__], str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", config.to_dict())
        notes = {**plan.notes, "template": plan.template, "warnings": plan.warnings, "dtype": config.to_dict()["dtype"]}
        record = write_weights(plan.ledger, targets, folder, dtype, notes=notes)
        return with_text_loss(folder, record, config.text_config.vocab_size)


def inputs_per_image(config: Any) -> int:
    """How many inputs of the decoder a picture becomes."""
    if config.patches_joined:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return int(side * side // config.patches_joined)
    return int(config.num_query_tokens)


def _dtype(request: ImageChatImport, ledger: Ledger) -> torch.dtype:
    if request.dtype != "auto":
        return DTYPES[request.dtype]
    kinds: dict[torch.dtype, int] = {}
    source = ledger.sources[LANGUAGE]
    for name in source.stored:
        meta = source.meta(name)
        kinds[meta.dtype] = kinds.get(meta.dtype, 0) + meta.numel()
    found = max(kinds, key=lambda kind: kinds[kind])
    if found not in DTYPES.values():
        message = f"{source.label} is stored as {found}; say with dtype how the model shall be written"
        raise InvalidCheckpoint("unsupported_dtype", message, "dtype")
    return found


def savings(ledger: Ledger, folded: int = 0) -> list[dict[str, Any]]:
    """What the import makes smaller without changing an output, largest first.

    Args:
        ledger: complete.
        folded: parameters saved by making one projection of two.
    """
    found = [{"what": rule, "bytes": size} for rule, size in ledger.dropped_bytes().items() if size]
    source = ledger.sources[DELTA]
    adapters = sum(source.bytes(name) for name in source.stored if ".lora_" in name)
    found += [{"what": "adapters_merged", "bytes": adapters}] if adapters else []
    width = source.meta("llama_proj.weight").element_size()
    found += [{"what": "projections_folded", "bytes": folded * width}] if folded else []
    return sorted(found, key=lambda one: (-int(str(one["bytes"])), str(one["what"])))
