"""Checkpoints whose text decoder is one part of several: where the decoder sits, and what stands around it.

A vision-language model keeps its decoder's configuration in `text_config` and its tensors under a prefix. Seen through
`Placed`, the decoder is the text model that its family's table describes; the vision tower and what joins the two stay
as they are. Names on disk are not those in memory (transformers renames while it loads), and releases spell them in
several ways: a checkpoint is written as it was spelled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.composite_rows import ASSUMED, COMPOSITES, REDUCED, Composite, Spelling, reduced_architecture
from preflight.families import known_decoders, table
from preflight.safetensors_header import TensorEntry
from preflight.strict_json import shown

TEXT = "text_config"
OF_THE_WHOLE = ("architectures", "quantization_config", "transformers_version")  # not written into `text_config`
LEFT_BEHIND = ("auto_map", "_name_or_path")
_ABSENT = object()


@dataclass(frozen=True)
class Placed:
    """A decoder in its place in one checkpoint.

    Attributes:
        composite: the architecture.
        whole: config.json.
        view: the configuration that the decoder would have as a checkpoint of its own.
        tensors: of the decoder, under the names of the text model.
        others: all other tensors, under their names on disk.
        spelling: of the decoder's tensors on disk.
    """

    composite: Composite
    whole: Mapping[str, Any]
    view: dict[str, Any]
    tensors: dict[str, TensorEntry]
    others: dict[str, TensorEntry]
    spelling: Spelling

    def disk_name(self, name: str) -> str:
        """What a tensor of the text model is called in this checkpoint."""
        return next((disk + name.removeprefix(text) for disk, text in self.spelling if name.startswith(text)), name)

    def name_in_memory(self, name: str) -> str:
        """What a tensor or module of the text model is called in the class that loads the whole."""
        spelling = self.composite.spellings[-1]
        return next((whole + name.removeprefix(text) for whole, text in spelling if name.startswith(text)), name)

    def others_by_part(self) -> dict[str, list[TensorEntry]]:
        """The other tensors by the part that they belong to."""
        parts: dict[str, list[TensorEntry]] = {}
        for name, entry in self.others.items():
            parts.setdefault(self.composite.part_of(name), []).append(entry)
        return parts

    def config_with(self, view: Mapping[str, Any]) -> dict[str, Any]:
        """The whole's configuration with a changed decoder in it; what did not change is written as it was.

        Args:
            view: the changed decoder's configuration, as of a checkpoint of its own.
        """
        flat = self.whole.get(TEXT) is None
        nested = dict(self.whole if flat else self.whole[TEXT])
        own = {*OF_THE_WHOLE, *(("block_shapes", "model_type") if self.composite.fixed_decoder else ())}
        for key in (self.view.keys() | view.keys()) - own:
            value = view.get(key, _ABSENT)
            if value is _ABSENT:
                nested.pop(key, None)
            elif value != self.view.get(key, _ABSENT):
                nested[key] = value
        whole = nested if flat else dict(self.whole)
        whole.update({key: view[key] for key in ("quantization_config", "transformers_version") if key in view})
        if self.composite.fixed_decoder and "block_shapes" in view:
            whole.update(
                model_type=REDUCED + self.composite.model_type,
                architectures=[reduced_architecture(self.composite)],
                block_shapes=view["block_shapes"],
            )
        if view["tie_word_embeddings"] != self.view["tie_word_embeddings"]:
            whole["tie_word_embeddings"] = view["tie_word_embeddings"]
        if not flat:
            whole[TEXT] = {key: value for key, value in nested.items() if key not in LEFT_BEHIND}
        return {key: value for key, value in whole.items() if key not in LEFT_BEHIND}


def composite_of(config: Mapping[str, Any]) -> Composite | None:
    """The row for a configuration's `model_type`, or None: a decoder alone, or an architecture without a row."""
    return COMPOSITES.get(str(config.get("model_type")).removeprefix(REDUCED))


def place(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Placed | None:
    """Find the decoder in a checkpoint; None where the checkpoint is of no known composite.

    Raises:
        InvalidCheckpoint: `invalid_config` when `text_config` is no object.
    """
    composite = composite_of(config)
    if composite is None:
        return None
    view = _view(composite, config)
    found = [one for one in composite.spellings if any(name.startswith(one[0][0]) for name in tensors)]
    spelling = max(found or composite.spellings[-1:], key=lambda one: len(one[0][0]))
    inside: dict[str, TensorEntry] = {}
    others: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        text = next((text + name.removeprefix(disk) for disk, text in spelling if name.startswith(disk)), None)
        if text is None:
            others[name] = entry
        else:
            inside[text] = entry
    return Placed(composite, config, view, inside, others, spelling)


def _view(composite: Composite, config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's configuration as of a checkpoint of its own."""
    nested = config.get(TEXT)
    if nested is None and composite.may_be_flat:
        nested = config
    if not isinstance(nested, Mapping):
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: text_config is {shown(nested)}; a {composite.model_type} needs an object with its decoder's "
            "configuration",
            TEXT,
        )
    kind = composite.decoder if composite.fixed_decoder else nested.get("model_type") or composite.decoder
    known = kind in known_decoders()
    view = {**ASSUMED.get(str(kind), {}), **nested, "model_type": kind}
    if config.get("block_shapes"):  # an artifact of ours, which is not compressed again
        view["model_type"] = f"{REDUCED}{kind}"
    tied = config.get("tie_word_embeddings", composite.tied)
    view["tie_word_embeddings"] = bool(tied or (composite.tied_by_text and nested.get("tie_word_embeddings")))
    view["architectures"] = [table(str(kind)).architecture] if known else []
    if config.get("quantization_config"):
        view["quantization_config"] = config["quantization_config"]
    return view
