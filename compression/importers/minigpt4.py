"""MiniGPT-4 and MiniGPT-v2 from their authors' files: ViT, Q-Former (or joined patches), projection, LLaMA.

Source: Vision-CAIR/MiniGPT-4 `minigpt4/models/{minigpt4,minigpt_v2}.py`, `configs/models/*.yaml`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import LlamaChatImport, MiniGpt4Import
from compression.importers.blip2_parts import DELTA, use_ln_vision, use_q_former, use_vision
from compression.importers.image_chat import Plan, language_settings, new_ledger, savings, write_model
from compression.importers.ledger import Key, Ledger
from compression.importers.llama_base import LANGUAGE, check_version, use_llama
from compression.importers.lora import plain_names
from compression.runtime.minigpt4 import MiniGpt4Config, MiniGpt4ForConditionalGeneration


def convert(request: MiniGpt4Import, target: Path) -> dict[str, Any]:
    """Write the model folder `target`; return the record of the import that lies in it.

    Raises:
        InvalidCheckpoint: a file is damaged, of another model, or incomplete; the message names file and key.
        NotFound: `file_not_found`.
        Conflict: `target_exists`.
    """
    ledger = new_ledger(request, "minigpt4")
    names = plain_names(ledger.sources[DELTA].stored, "llama_model.")
    adapted = any(".lora_" in name for name in names)
    settings = whole_settings(ledger, request, names, request.lora_alpha, size=448 if adapted else 224)
    joined = settings["patches_joined"]
    plan = Plan(
        ledger,
        MiniGpt4Config,
        MiniGpt4ForConditionalGeneration,
        settings,
        request.template or ("inst" if joined else "human"),
        notes={"savings": savings(ledger)},
    )
    return write_model(request, plan, target)


def whole_settings(
    ledger: Ledger,
    request: LlamaChatImport,
    names: Mapping[str, str],
    alpha: float,
    *,
    size: int = 224,
    adapters: bool = False,
) -> dict[str, Any]:
    """Enter all parts into the account; return the settings of the whole.

    Args:
        ledger: over the request's sources.
        request: what was asked for.
        names: of the delta's decoder tensors, by their names in the runtime.
        alpha: of LoRA adapters.
        size: of pictures, unless the request says another.
        adapters: whether blocks have a bottleneck.

    Raises:
        InvalidCheckpoint: as the parts' own functions.
    """
    text = use_llama(ledger, names, language_settings(request), alpha, adapters=adapters)
    if not request.accept_base:
        label = ledger.sources[LANGUAGE].label
        check_version(label, text["vocab_size"], text["hidden_size"], q_former=request.q_former is not None)
    vision = use_vision(ledger, request.image_size or size, request.vision_heads)
    for kind in ("weight", "bias"):
        ledger.use(f"language_projection.{kind}", Key(DELTA, f"llama_proj.{kind}"))
    settings: dict[str, Any] = {"vision_config": vision, "text_config": text, "patches_joined": 0}
    if request.q_former is None:
        _use_plain_ln_vision(ledger, vision["hidden_size"])
        return {**settings, "patches_joined": _joined(ledger, vision)}
    use_ln_vision(ledger)
    q_former = use_q_former(ledger, request.q_former_heads)
    queries = q_former.pop("num_query_tokens")
    return {**settings, "qformer_config": q_former, "num_query_tokens": queries}


def _use_plain_ln_vision(ledger: Ledger, width: int) -> None:
    """Without BLIP-2's file the norm after the ViT stays as it was made, unless the delta has one."""
    for kind, make in (("weight", torch.ones), ("bias", torch.zeros)):
        name = f"ln_vision.{kind}"
        target = f"vision_model.post_layernorm.{kind}"
        if name in ledger.sources[DELTA].stored:
            ledger.use(target, Key(DELTA, name))
        else:
            ledger.use(
                target, how="as it was made: no file of this variant has it", build=lambda make=make: make(width)
            )


def _joined(ledger: Ledger, vision: Mapping[str, Any]) -> int:
    """How many patches side by side make one input, by the projection's width."""
    inputs, width = ledger.sources[DELTA].shape("llama_proj.weight")[1], vision["hidden_size"]
    side = vision["image_size"] // vision["patch_size"]
    if inputs % width or side * side % (inputs // width):
        message = (
            f"llama_proj.weight reads {inputs} channels, no whole number of patches of {width} that divides "
            f"{side * side}; give q_former if this variant has one"
        )
        raise InvalidCheckpoint("wrong_shape", message, "llama_proj.weight")
    return int(inputs // width)
