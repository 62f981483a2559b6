"""LoRA adapters in the forms that peft has written them in, and their exact merge.

    peft 0.2       …query_key_value.lora_A.weight
    peft 0.3       …query_key_value.lora_A.default.weight
    later          the same, with the frozen weight under …query_key_value.base_layer.weight

A loader that matches names loosely loads none of the others' forms and says nothing.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from compression.importers.ledger import Key

WRAPPED = "base_model.model."


def plain_names(stored: Iterable[str], prefix: str) -> dict[str, str]:
    """Map plain names of a decoder's tensors to those under which a delta stores them.

    Args:
        stored: all names of the delta.
        prefix: of the decoder, `llama_model.` for one; other names are left out.

    Raises:
        InvalidCheckpoint: `duplicate_tensor`: one tensor is stored in two forms.
    """
    found: dict[str, str] = {}
    for name in sorted(stored):
        if not name.startswith(prefix):
            continue
        plain = name.removeprefix(prefix).removeprefix(WRAPPED).replace(".base_layer.", ".")
        for half in ("lora_A", "lora_B"):
            plain = plain.replace(f".{half}.default.weight", f".{half}.weight")
        if plain in found:
            message = f"{name} and {found[plain]} are the same tensor in two forms of peft; keep one of them"
            raise InvalidCheckpoint("duplicate_tensor", message, name)
        found[plain] = name
    return found


def adapter_of(names: Mapping[str, str], module: str, role: str) -> tuple[Key, ...]:
    """The two halves of a module's adapter, or nothing where it has none; one half alone is found missing later."""
    halves = [f"{module}.lora_{half}.weight" for half in "AB"]
    if not any(half in names for half in halves):
        return ()
    return tuple(Key(role, names.get(half, half)) for half in halves)


def merged(weight: Tensor, adapter: tuple[Tensor, ...], scale: float) -> Tensor:
    """W + scale · B · A in float64, rounded once to float32; W itself without an adapter.

    Args:
        weight: `[out_features, in_features]`.
        adapter: A `[rank, in_features]` and B `[out_features, rank]`, or nothing.
        scale: alpha over rank.
    """
    if not adapter:
        return weight
    first, second = adapter
    return (weight.double() + scale * (second.double() @ first.double())).float()
