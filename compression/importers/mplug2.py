"""Imports mPLUG-2: one file of a caption or question-answering checkpoint, complete but mostly of no use to its task.

A published file holds everything that its training had: the text half of CLIP, whole encoders of which a task runs two
layers, twins for distillation. What a task does not run is left behind by named rules, and the outputs are the same.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import MPlug2Import
from compression.importers.ledger import Key, Ledger, shapes_of
from compression.importers.mplug2_files import PROMPT, BertSizes, read_sizes, read_tokenizer
from compression.importers.mplug2_names import VISUAL, origin_of
from compression.importers.sources import Source, open_source
from compression.importers.writing import new_folder, write_weights
from compression.runtime.mplug2 import MPlug2Config, empty_model
from compression.runtime.video_former import CHANNELS, HEAD_DIM
from preflight.checkpoint import open_checkpoint
from preflight.strict_json import shown

NAME, ROLE = "mplug2", "checkpoint"
RULES = {
    "clip_text_tower": "CLIP's text half, which only set initial values",
    "clip_projection": "from vision to CLIP's shared space, which no task here uses",
    "momentum_twin": "slow copies of the parts, used in training alone",
    "unused_vision_mlp": "built into the last two layers and called nowhere",
    "decoder_latents": "built into the decoder and called nowhere",
    "text_reading": "reads questions; a caption has none",
    "fusion_encoder": "joins questions and frames; a caption has none",
    "fusion_below": "of the fusion encoder only the last layers run, on the text encoder's output",
    "positions": "counts 0, 1, 2, … which the model makes itself",
    "tied_head": "the decoder's embedding or bias once more",
}
DECODER = "text_decoder"
HEAD = f"{DECODER}.cls.predictions.decoder"
TIED = {
    f"{HEAD}.weight": f"{DECODER}.bert.embeddings.word_embeddings.weight",
    f"{HEAD}.bias": f"{DECODER}.cls.predictions.bias",
}


def convert(request: MPlug2Import, target: Path) -> dict[str, Any]:
    """Write the model folder `target`, which must not exist; return the record of the import that lies in it.

    Raises:
        NotFound: `file_not_found`.
        InvalidCheckpoint: what `open_source`, `read_sizes`, `read_tokenizer` and `Ledger.balance` raise; `wrong_task`,
            `unsupported_video_encoder`, `untied_head`, `duplicate_tensor`.
        Conflict: `target_exists`.
    """
    source = open_source(Path(request.checkpoint), ROLE)
    names = _canonical_names(source)
    _check_task(source, names, request.task)
    sizes, words = read_sizes(Path(request.bert_config)), read_tokenizer(Path(request.tokenizer))
    config = _config(source, names, sizes, request, words)
    targets = shapes_of((n, t) for n, t in empty_model(config).state_dict().items() if n not in TIED)
    ledger = Ledger(NAME, {ROLE: source}, RULES)
    _use(ledger, targets, names, config, sizes)
    _drop(ledger, source, names, config, sizes)
    ledger.balance(targets)
    saved = [{"what": rule, "bytes": size} for rule, size in ledger.dropped_bytes().items() if size]
    notes = {"task": request.task, "savings": sorted(saved, key=lambda one: -int(str(one["bytes"])))}
    with new_folder(target) as unfinished:
        config.save_pretrained(unfinished)
        words.save_pretrained(unfinished)
        record = write_weights(ledger, targets, unfinished, _dtypes(ledger), notes=notes)
        open_checkpoint(unfinished)
    return record


def _canonical_names(source: Source) -> dict[str, str]:
    """Stored names by those of a fine-tuned file: pretraining files have more words in them."""
    names: dict[str, str] = {}
    for stored in source.stored:
        name = stored if "decode" in stored else stored.replace("fusion.", "").replace("bert.", "")
        if name in names:
            message = f"{source.label} has {shown(names[name])} and {shown(stored)}, which are the same tensor"
            raise InvalidCheckpoint("duplicate_tensor", message, stored)
        names[name] = stored
    return names


def _check_task(source: Source, names: Mapping[str, str], task: str) -> None:
    twins = [names[name] for name in names if _matches(TWINS, name)]
    if twins and task == "caption":
        message = (
            f"{source.label} has {shown(twins[0])}, a twin for distillation, which files for questions alone have; "
            "import it with task 'question'"
        )
        raise InvalidCheckpoint("wrong_task", message, "task")


TWINS = r"(visual_encoder|text_encoder|fusion_encoder|text_decoder|visn_emb_norm|visn_fc|visn_layer_norm)_m\..*"


def _config(
    source: Source, names: Mapping[str, str], sizes: BertSizes, request: MPlug2Import, words: Any
) -> MPlug2Config:
    patches, positions = f"{VISUAL}.conv1.weight", f"{VISUAL}.positional_embedding"
    for name in (patches, positions):
        if name not in names:
            message = f"{source.label} has no {name!r}; give the complete file of mPLUG-2, not CLIP's or BERT's"
            raise InvalidCheckpoint("missing_tensor", message, name)
    shape = source.shape(names[patches])
    places = source.shape(names[positions])[0] - 1
    side = round(places**0.5)
    sound = len(shape) == 5 and shape[1:3] == (CHANNELS, 1) and shape[3] == shape[4] and shape[0] % HEAD_DIM == 0
    if not sound or side**2 != places:
        message = (
            f"{source.label}: {patches} is {list(shape)} and there are {places} patches; known are [width, 3, 1, p, p] "
            f"with a width that {HEAD_DIM} divides, on a square"
        )
        raise InvalidCheckpoint("unsupported_video_encoder", message, patches)
    found = (re.match(rf"{VISUAL}\.transformer\.resblocks\.(\d+)\.", name) for name in names)
    blocks = 1 + max((int(one[1]) for one in found if one is not None), default=-1)
    vision = {"width": shape[0], "patch": shape[3], "image": side * shape[3], "blocks": blocks}
    caption = request.task == "caption"
    config = MPlug2Config(
        task=request.task,
        vision=vision,
        text=sizes.text(layers=sizes.universal if caption else sizes.text_layers),
        fusion_layers=0 if caption else sizes.fusion_run,
        decoder=sizes.decoder(words.pad_token_id),
        frames=request.frames,
        beams={"start": words.cls_token_id, "end": words.sep_token_id},
        prompt=PROMPT if caption else "",
    )
    config.architectures = ["MPlug2ForVideoText"]
    return config


def _use(
    ledger: Ledger, targets: Mapping[str, Any], names: Mapping[str, str], config: MPlug2Config, sizes: BertSizes
) -> None:
    for target in targets:
        published, how, build = origin_of(target, config, sizes)
        key = Key(ROLE, names.get(published, published))
        if build is None:
            ledger.use(target, key)
        else:
            ledger.use(target, key, how=how, build=build)


def _drop(ledger: Ledger, source: Source, names: Mapping[str, str], config: MPlug2Config, sizes: BertSizes) -> None:
    """Leave behind, by rule, what the task does not run."""
    by_stored = {stored: name for name, stored in names.items()}
    for rule, pattern in _patterns(config, sizes):
        ledger.drop(ROLE, rule, lambda stored, p=pattern: _matches(p, by_stored[stored]))  # type: ignore[misc]
    for copy, original in TIED.items():
        if copy in names and original in names:
            if not torch.equal(source.read(names[copy]), source.read(names[original])):
                message = (
                    f"{source.label}: {copy} differs from {original}, and mPLUG-2 ties the two; is the file damaged?"
                )
                raise InvalidCheckpoint("untied_head", message, copy)
            ledger.drop(ROLE, "tied_head", partial(_is, names[copy]))


def _patterns(config: MPlug2Config, sizes: BertSizes) -> list[tuple[str, str]]:
    tower = r"visual_encoder\.(transformer\..*|token_embedding\..*|positional_embedding|ln_final\..*|text_projection)"
    last = "|".join(str(index) for index in range(sizes.text_layers - sizes.universal, sizes.text_layers))
    decoder_last = "|".join(str(n) for n in range(sizes.decoder_layers - sizes.universal, sizes.decoder_layers))
    unused = r"(intermediate|output)_vision\..*"
    patterns = [
        ("momentum_twin", TWINS),
        ("positions", r"(text_encoder|fusion_encoder|text_decoder\.bert)\.embeddings\.position_ids"),
        ("clip_text_tower", rf"{tower}|visual_encoder\.logit_scale"),
        ("clip_projection", r"visual_encoder\.visual\.proj"),
        ("unused_vision_mlp", rf"text_encoder\.encoder\.layer\.({last})\.{unused}"),
        ("unused_vision_mlp", rf"text_decoder\.bert\.encoder\.layer\.({decoder_last})\.{unused}"),
        ("decoder_latents", rf"text_decoder\.bert\.encoder\.layer\.{sizes.decoder_layers - sizes.universal}\.latents"),
    ]
    below = "|".join(str(index) for index in range(sizes.text_layers - sizes.universal))
    fusion = "|".join(str(index) for index in range(sizes.fusion_layers - sizes.fusion_run))
    if config.task == "caption":
        patterns.append(("text_reading", rf"text_encoder\.(embeddings\..*|encoder\.layer\.({below})\..*)"))
        patterns.append(("fusion_encoder", r"fusion_encoder\..*"))
    else:
        patterns.append(("fusion_below", rf"fusion_encoder\.(embeddings\..*|encoder\.layer\.({fusion})\..*)"))
    return patterns


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _is(wanted: str, name: str) -> bool:
    return name == wanted


def _dtypes(ledger: Ledger) -> Callable[[str], torch.dtype]:
    """Every tensor keeps the dtype of what it is made of."""

    def dtype_of(target: str) -> torch.dtype:
        key = ledger.entries[target].keys[-1]
        return ledger.sources[key.role].meta(key.name).dtype

    return dtype_of
