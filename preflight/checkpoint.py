"""Opens a model folder: every structural check, no weight read; and says what it is.

`open_checkpoint` raises for what is corrupt or hostile. `describe` lists as blockers what is sound but cannot be
compressed here, and as warnings what was left aside.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from api_schemas.errors import InvalidCheckpoint
from api_schemas.models import CheckpointFacts
from preflight.composites import Placed, place
from preflight.engines import engines_of
from preflight.facts import (
    block_parameters,
    blocks_of,
    count_parts,
    find_blockers,
    find_warnings,
    part_blockers,
    whole_number,
)
from preflight.families import Family, resolve
from preflight.folder_scan import FolderContents, scan
from preflight.remote_code import refuse_remote_code
from preflight.safetensors_header import TensorEntry
from preflight.shards import SUFFIX, read_tensors
from preflight.strict_json import read_object, shown_list
from preflight.tables import has_rule
from preflight.tensor_check import (
    architecture_of,
    check_parts,
    check_tensors,
    head_is_copy,
    known_family,
    stored_head,
)
from preflight.tokenizer_files import SETTINGS, TokenizerFacts, read_tokenizer
from preflight.vision import (
    has_processor,
    has_vision,
    image_warnings,
    reads_images,
    searches_answers,
    text_config,
)

CONFIG = "config.json"
MODEL_SETTINGS = (SETTINGS, "generation_config.json", "processor_config.json", "preprocessor_config.json")
SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md", ".tiktoken")
SIDE_WORDS = ("license", "notice", "copying")
MANIFEST, EXPORTS = "modepress.json", "exports/"
MORE_TEMPLATES = "additional_chat_templates/"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that passed every structural check.

    Attributes:
        folder: where it lies.
        config: config.json.
        tensors: every stored tensor by name; includes a copy of a tied head where one is stored.
        side_files: names of the files that belong to the model beside weights and config.json: to be copied along.
        tokenizer: what the tokenizer's files say.
        warnings: what was left aside.
        placed: the decoder in its place, where the checkpoint has other parts too.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    side_files: tuple[str, ...]
    tokenizer: TokenizerFacts
    warnings: tuple[str, ...] = ()
    placed: Placed | None = None

    @property
    def decoder(self) -> "Checkpoint":
        """The text decoder alone, as its family's table describes it: what is planned and compressed."""
        if self.placed is None:
            return self
        return replace(self, config=self.placed.view, tensors=self.placed.tensors)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder without reading a weight, loading a class or running anything in it.

    Raises:
        InvalidCheckpoint: with the codes of `folder_scan.scan`, `refuse_remote_code`, `read_tensors`, `check_tensors`
            and `read_tokenizer`; `missing_config`, `invalid_config`, or `unreadable_file`.
    """
    try:
        return _open(folder)
    except OSError as error:
        raise InvalidCheckpoint(
            "unreadable_file", f"{error.filename or folder} cannot be read: {error.strerror}; check its permissions"
        ) from error


def _open(folder: Path) -> Checkpoint:
    contents = scan(folder)
    if CONFIG not in contents.files:
        raise InvalidCheckpoint("missing_config", f"no {CONFIG} in the folder; push the model's configuration", CONFIG)
    config = read_object(folder / CONFIG, "invalid_config")
    refuse_remote_code(config, CONFIG)
    for name in MODEL_SETTINGS:
        if name in contents.files:
            refuse_remote_code(read_object(folder / name, "invalid_config"), name)
    tensors, warnings = read_tensors(folder, contents.files)
    placed = place(config, tensors)
    if placed is None:
        family = known_family(config)
        if family is not None:
            tensors = family.full_names(tensors)
        check_tensors(config, tensors)
    else:
        check_tensors(placed.view, placed.tensors)
        check_parts(placed)
    side_files, ignored = _side_files(contents)
    if ignored:
        warnings += (f"not part of the model and left aside: {shown_list(ignored)}",)
    tokenizer = read_tokenizer(folder, contents.files)
    return Checkpoint(folder, config, tensors, side_files, tokenizer, warnings, placed)


def _side_files(contents: FolderContents) -> tuple[tuple[str, ...], list[str]]:
    """Split what is neither weights nor config.json into what belongs to the model and what does not."""
    side: list[str] = []
    ignored: list[str] = []
    for name in contents.files + contents.nested:
        if name == CONFIG or ("/" not in name and name.endswith((SUFFIX, SUFFIX + ".index.json"))):
            continue
        if name.startswith(EXPORTS) and MANIFEST in contents.files:
            continue  # foreign formats of an artifact of ours: made again for each artifact
        top_level = "/" not in name and not name.startswith(".") and not name.endswith(".index.json")
        wanted = name.lower().endswith(SIDE_SUFFIXES) or name.lower().startswith(SIDE_WORDS)
        is_template = name.startswith(MORE_TEMPLATES) and name.endswith(".jinja") and name.count("/") == 1
        (side if (top_level and wanted) or is_template else ignored).append(name)
    return tuple(side), ignored


def describe(checkpoint: Checkpoint) -> CheckpointFacts:
    """Say what a checkpoint is, what would stop every recipe, and what a user should know."""
    placed, decoder = checkpoint.placed, checkpoint.decoder
    config, tensors = decoder.config, decoder.tensors
    whole = config if placed is None else placed.whole
    try:
        family = resolve(config)
    except InvalidCheckpoint:
        family = None  # find_blockers names the reason
    head = stored_head(config, tensors)
    is_copy = head_is_copy(config, tensors)
    others = [] if placed is None else list(placed.others.values())
    counted = [entry for name, entry in tensors.items() if not (is_copy and name == head)] + others
    dtypes: dict[str, int] = {}
    for entry in counted:
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.parameters
    return CheckpointFacts(
        model_type=str(whole.get("model_type") or ""),
        architecture=architecture_of(whole),
        family=family.name if family else None,
        modality=_modality(placed, whole),
        engines=engines_of(checkpoint.folder),
        reads_images=reads_images(whole) and (searches_answers(whole) or has_processor(checkpoint.side_files)),
        reads_tables=has_rule(checkpoint.side_files),
        parts=count_parts(placed, counted),
        parameters=sum(dtypes.values()),
        block_parameters=block_parameters(family, tensors),
        blocks=blocks_of(family, config),
        bytes=sum(entry.bytes for entry in (*tensors.values(), *others)),
        dtype=max(dtypes, key=lambda dtype: (dtypes[dtype], dtype), default=""),
        dtypes=dtypes,
        tied_head=bool(_setting(family, config, "tie_word_embeddings")) and (head is None or is_copy),
        vocabulary=whole_number(text_config(config).get("vocab_size")) or 0,
        context_length=whole_number(_setting(family, config, "max_position_embeddings")),
        has_tokenizer=checkpoint.tokenizer.present,
        has_chat_template=checkpoint.tokenizer.has_chat_template,
        blockers=find_blockers(config, tensors, checkpoint.tokenizer) + part_blockers(placed, whole),
        warnings=checkpoint.warnings
        + find_warnings(config, tensors, checkpoint.tokenizer)
        + image_warnings(whole, checkpoint.side_files),
    )


def _modality(placed: Placed | None, config: Mapping[str, Any]) -> Literal["text", "image-text", "table-text"]:
    if placed is not None:
        return "image-text" if placed.composite.reads == "image" else "table-text"
    return "image-text" if has_vision(config) or searches_answers(config) else "text"


def _setting(family: Family | None, config: Mapping[str, Any], name: str) -> Any:
    return text_config(config).get(name) if family is None else family.setting(config, name)
