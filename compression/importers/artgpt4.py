"""ArtGPT-4 from its authors' files: MiniGPT-4's parts, and a trained bottleneck in every block of Vicuna 13B.

Which norms were trained differs between the authors' program and their file: whatever norms the file has are taken.

Source: DLYuanGod/ArtGPT-4 `minigpt4/models/{mini_gpt4,modeling_llama}.py`; arXiv 2305.07490.
"""

from pathlib import Path
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from api_schemas.imports import ArtGpt4Import
from compression.importers.blip2_parts import DELTA
from compression.importers.image_chat import Plan, new_ledger, savings, write_model
from compression.importers.llama_base import without_lists
from compression.importers.lora import plain_names
from compression.importers.minigpt4 import whole_settings
from compression.runtime.artgpt4 import ArtGpt4Config, ArtGpt4ForConditionalGeneration, ArtGpt4LlamaConfig

FIRST = "llama_model.model.layers.0.self_attn.1.down.weight"


def convert(request: ArtGpt4Import, target: Path) -> dict[str, Any]:
    """Write the model folder `target`; return the record of the import that lies in it.

    Raises:
        InvalidCheckpoint: a file is damaged, of another model, or incomplete; the message names file and key.
        NotFound: `file_not_found`.
        Conflict: `target_exists`.
    """
    ledger = new_ledger(request, "artgpt4")
    delta = ledger.sources[DELTA]
    if FIRST not in delta.stored:
        message = f"{delta.label} has no {FIRST}: it is not ArtGPT-4's; for MiniGPT-4's own file import minigpt4"
        raise InvalidCheckpoint("missing_tensor", message, FIRST)
    names = without_lists(plain_names(delta.stored, "llama_model."))
    settings = whole_settings(ledger, request, names, alpha=1.0, adapters=True)
    settings["text_config"] |= {
        "model_type": ArtGpt4LlamaConfig.model_type,
        "adapter_size": delta.shape(FIRST)[0],
    }
    norms = sorted(name for name in names if name.endswith("layernorm.weight"))
    plan = Plan(
        ledger,
        ArtGpt4Config,
        ArtGpt4ForConditionalGeneration,
        settings,
        request.template or "human",
        notes={"savings": savings(ledger), "trained_norms": len(norms)},
    )
    return write_model(request, plan, target)
