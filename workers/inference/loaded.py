"""What `/loaded` says: models in memory, their bytes and how they are held."""

from typing import Any

from workers.inference.engine import Engine
from workers.inference.models import Slot


def loaded_models(engine: Engine) -> dict[str, Any]:
    """Return the models in memory, least recently used first, with the memory limit and the line."""
    models, line = engine.models, engine.line
    return {
        "object": "list",
        "data": [_describe(slot) for slot in models.slots],
        "has_more": False,
        "memory": {"limit_bytes": models.limit_bytes, "used_bytes": models.used_bytes},
        "queue": {"running": line.running, "waiting": line.waiting, "max_waiting": line.max_waiting},
        "draining": engine.draining,
    }


def _describe(slot: Slot) -> dict[str, Any]:
    common = {
        "id": slot.source.id,
        "object": "loaded_model",
        "engine": slot.source.engine,
        "bytes": slot.bytes,
        "users": slot.users,
        "last_used_at": int(slot.last_used),
    }
    loaded = slot.loaded
    if loaded is None:
        return common | {"status": "loading"}
    precision = loaded.precision
    return common | {
        "status": "ready",
        "dtype": precision.name,
        "stored_dtype": str(precision.stored).removeprefix("torch."),
        "dtype_reason": precision.reason,
        "device": precision.device,
        "load_seconds": round(loaded.seconds, 3),
        "context_length": loaded.context_length,
        "input_modalities": [
            "text",
            *["image"] * (loaded.processor is not None or loaded.searches),
            *["table"] * (loaded.tables is not None),
        ],
        "eos_ids": sorted(loaded.eos_ids),
        "sampling_defaults": loaded.defaults.model_dump(),
    }
