"""TinyGPT-V, stages 1 to 4, from the files that its authors ship to one model folder that loads, chats and compresses.

A stage's file is a delta: LoRA, norms and projections over Phi-2, EVA ViT-g and BLIP-2's Q-Former, two thirds of it
moments of an optimiser. Adapters are merged, the two projections (nothing stands between them) become one.

Source: DLYuanGod/TinyGPT-V `minigpt4/models/{base_model,minigpt4,minigpt_v2}.py`, `eval_configs/`; arXiv 2312.16862.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import TinyGptvImport
from compression.importers.blip2_parts import DELTA, use_ln_vision, use_q_former, use_vision
from compression.importers.image_chat import Plan, language_settings, new_ledger, savings, write_model
from compression.importers.ledger import Key, Ledger
from compression.importers.lora import plain_names
from compression.importers.phi_base import layout_name, use_phi
from compression.runtime.tinygptv import TinyGptvConfig, TinyGptvForConditionalGeneration, TinyGptvPhiConfig

IMAGE_SIZE = {1: 224, 2: 224, 3: 224, 4: 448}
# What stage 4 was trained with is not known: its code says [INST], its evaluation asks with ###Human, as stage 3 does.
TEMPLATE = {1: "caption", 2: "caption", 3: "human", 4: "human_bare"}
PRETRAINING = (1, 2)


def convert(request: TinyGptvImport, target: Path) -> dict[str, Any]:
    """Write the model folder `target`; return the record of the import that lies in it.

    Raises:
        InvalidCheckpoint: a file is damaged, of another model, or incomplete; the message names file and key.
        NotFound: `file_not_found`.
        Conflict: `target_exists`.
    """
    ledger = new_ledger(request, "tinygptv")
    names = plain_names(ledger.sources[DELTA].stored, "llama_model.")
    adapted = any(".lora_" in name for name in names)
    stage = _stage(request, ledger, adapted=adapted)
    size = request.image_size or IMAGE_SIZE[stage]
    vision = use_vision(ledger, size, request.vision_heads)
    use_ln_vision(ledger)
    q_former = use_q_former(ledger, request.q_former_heads)
    text = {**_text_settings(language_settings(request)), **use_phi(ledger, names, request.lora_alpha)}
    folded = fold_projections(ledger)
    queries = q_former.pop("num_query_tokens")
    plan = Plan(
        ledger,
        TinyGptvConfig,
        TinyGptvForConditionalGeneration,
        {"vision_config": vision, "qformer_config": q_former, "text_config": text, "num_query_tokens": queries},
        request.template or TEMPLATE[stage],
        notes={
            "stage": stage,
            "language_layout": layout_name(ledger),
            "savings": savings(ledger, folded),
        },
        warnings=_warnings(stage),
    )
    return write_model(request, plan, target)


def _stage(request: TinyGptvImport, ledger: Ledger, *, adapted: bool) -> int:
    """The stage, as asked or as the file's name says; keys must agree."""
    source = ledger.sources[DELTA]
    named = re.search(r"stage[_ -]?([1-4])", source.files[0].name, re.IGNORECASE)
    if request.stage is None and named is None and adapted:
        message = (
            f"{source.label}: its name does not say the stage; give stage 2, 3 or 4 (224 pixels before 4, then 448)"
        )
        raise InvalidCheckpoint("stage_unknown", message, "stage")
    stage = request.stage or (int(named[1]) if named else 1)
    if (stage > 1) != adapted:
        what = "has no LoRA adapters (lora_A, lora_B), which stages 2 to 4 have" if stage > 1 else "has LoRA adapters"
        message = f"{source.label} {what}, and stage is {stage}; give the file of that stage, or the right number"
        raise InvalidCheckpoint("stage_mismatch", message, "stage")
    return stage


def _warnings(stage: int) -> list[str]:
    if stage in PRETRAINING:
        return [f"pretraining_stage: stage {stage} only describes pictures; for questions take stage 3 or 4"]
    if stage == max(IMAGE_SIZE):
        return ["template_uncertain: stage 4's prompt form is not documented; try human_bare, human and inst"]
    return []


def _text_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape tells of Phi-2: from its config.json, new or old, else as Phi-2 has it."""
    rope = given.get("rope_parameters") or {}
    width, heads = (
        given.get("hidden_size") or given.get("n_embd"),
        given.get("num_attention_heads") or given.get("n_head"),
    )
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if share is None and given.get("rotary_dim") and width and heads:
        share = given["rotary_dim"] * heads / width
    return {
        "model_type": TinyGptvPhiConfig.model_type,
        "hidden_act": given.get("hidden_act") or given.get("activation_function") or "gelu_new",
        "layer_norm_eps": given.get("layer_norm_eps") or given.get("layer_norm_epsilon") or 1e-5,
        "max_position_embeddings": given.get("max_position_embeddings") or given.get("n_positions") or 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta", given.get("rope_theta")) or 10000.0,
            "partial_rotary_factor": 0.4 if share is None else share,
        },
        "tie_word_embeddings": False,
    }


def fold_projections(ledger: Ledger) -> int:
    """Enter the two projections as one, W2·W1 and W2·b1 + b2; return how many parameters that saves."""
    first, second = "llama_proj", "llama_proj2"
    keys = {name: Key(DELTA, name) for part in (first, second) for name in (f"{part}.weight", f"{part}.bias")}
    how = "both projections in one: W2·W1"

    def weight(two: Tensor, one: Tensor) -> Tensor:
        return (two.double() @ one.double()).float()

    def bias(two: Tensor, one: Tensor, last: Tensor) -> Tensor:
        return (two.double() @ one.double() + last.double()).float()

    ledger.use("language_projection.weight", keys[f"{second}.weight"], keys[f"{first}.weight"], how=how, build=weight)
    ledger.use(
        "language_projection.bias",
        keys[f"{second}.weight"],
        keys[f"{first}.bias"],
        keys[f"{second}.bias"],
        how="both projections in one: W2·b1 + b2",
        build=bias,
    )
    source = ledger.sources[DELTA]
    one, two = source.shape(f"{first}.weight"), source.shape(f"{second}.weight")
    return one[0] * one[1] + one[0] + two[0] * two[1] - two[0] * one[1]
