"""Checkpoints whose text decoder is one part of several: where the decoder sits, and what stands around it.

A vision-language model keeps its decoder's configuration in `text_config` and its tensors under a prefix. Seen through
`Placed`, the decoder is the text model that its family's table describes; the vision tower and what joins the two stay
as they are. Names on disk are not those in memory (transformers renames while it loads), and releases spell them in
several ways: a checkpoint is written as it was spelled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from preflight.families import known_families, table
from preflight.safetensors_header import TensorEntry
from preflight.strict_json import shown

Spelling = tuple[tuple[str, str], ...]  # prefixes on disk with those of the text model; the blocks' comes first

TEXT = "text_config"
OLD: Spelling = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
NEW: Spelling = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
TEXT_MODEL: Spelling = (("model.text_model.", "model."), ("lm_head.", "lm_head."))
OF_THE_WHOLE = ("architectures", "quantization_config", "transformers_version")  # not written into `text_config`
_ABSENT = object()


@dataclass(frozen=True)
class Composite:
    """One architecture of several parts.

    Attributes:
        model_type: of the whole.
        architecture: the class that loads all of it.
        vision: words in the names of the vision tower's tensors.
        projector: words in the names of what makes input embeddings of the tower's outputs.
        decoder: the decoder's `model_type` where `text_config` does not name it.
        decoders: families that its decoder may be of; each was compressed and reloaded in a test.
        spellings: of the decoder's tensors; the last is that of the class in memory.
        tied: whether the head is the embedding where the configuration is silent; the whole's word counts.
        tied_by_text: whether `text_config` may tie the head too.
        shares_mlp_width: whether the projector takes a width of its own from the decoder's `intermediate_size`.
    """

    model_type: str
    architecture: str
    vision: tuple[str, ...] = ("vision_tower.",)
    projector: tuple[str, ...] = ("multi_modal_projector.",)
    decoder: str = "llama"
    decoders: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "granite")
    spellings: tuple[Spelling, ...] = (OLD, NEW)
    tied: bool = False
    tied_by_text: bool = False
    shares_mlp_width: bool = False

    @property
    def decoder_in_memory(self) -> str:
        """The module of the whole class that holds the decoder's blocks."""
        return self.spellings[-1][0][0].removesuffix(".")

    def part_of(self, name: str) -> str:
        """The part that a tensor outside the decoder belongs to."""
        if any(word in name for word in self.projector):
            return "projector"
        return "vision" if any(word in name for word in self.vision) else "other"


def _llava(model_type: str, architecture: str, *, tied_by_text: bool = False) -> Composite:
    projector = ("multi_modal_projector.", "image_newline")
    return Composite(model_type, architecture, projector=projector, tied_by_text=tied_by_text)


def _idefics(model_type: str, architecture: str, decoder: str = "llama") -> Composite:
    return Composite(model_type, architecture, ("vision_model.",), ("connector.",), decoder, spellings=(TEXT_MODEL,))


_ROWS = (
    _llava("llava", "LlavaForConditionalGeneration", tied_by_text=True),
    _llava("llava_next", "LlavaNextForConditionalGeneration"),
    replace(
        _llava("llava_onevision", "LlavaOnevisionForConditionalGeneration", tied_by_text=True),
        decoder="qwen2",
    ),
    _llava("vipllava", "VipLlavaForConditionalGeneration"),
    replace(_idefics("idefics2", "Idefics2ForConditionalGeneration", "mistral"), shares_mlp_width=True),
    _idefics("idefics3", "Idefics3ForConditionalGeneration"),
    _idefics("smolvlm", "SmolVLMForConditionalGeneration"),
    Composite("mistral3", "Mistral3ForConditionalGeneration", decoder="mistral", tied=True),
    Composite("internvl", "InternVLForConditionalGeneration", decoder="qwen2", tied=True),
)
COMPOSITES = {row.model_type: row for row in _ROWS}
# What stock classes assume where a configuration is silent. A checkpoint of a decoder alone must say its sizes; inside
# a composite, releases leave out what equals the class's own.
ASSUMED: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "granite": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}


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
        nested = dict(self.whole.get(TEXT) or {})
        for key in (self.view.keys() | view.keys()) - set(OF_THE_WHOLE):
            value = view.get(key, _ABSENT)
            if value is _ABSENT:
                nested.pop(key, None)
            elif value != self.view.get(key, _ABSENT):
                nested[key] = value
        whole = {key: value for key, value in self.whole.items() if key not in ("auto_map", "_name_or_path")}
        whole.update({key: view[key] for key in OF_THE_WHOLE[1:] if key in view})
        if view["tie_word_embeddings"] != self.view["tie_word_embeddings"]:
            whole["tie_word_embeddings"] = view["tie_word_embeddings"]
        nested.pop("_name_or_path", None)
        return {**whole, TEXT: nested}


def composite_of(config: Mapping[str, Any]) -> Composite | None:
    """The row for a configuration's `model_type`, or None: a decoder alone, or an architecture without a row."""
    return COMPOSITES.get(str(config.get("model_type")))


def place(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Placed | None:
    """Find the decoder in a checkpoint; None where the checkpoint is of no known composite.

    Raises:
        InvalidCheckpoint: `invalid_config` when `text_config` is no object.
    """
    composite = composite_of(config)
    if composite is None:
        return None
    view = _view(composite, config)
    found = (one for one in composite.spellings if any(name.startswith(one[0][0]) for name in tensors))
    spelling = next(found, composite.spellings[-1])
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
    if not isinstance(nested, Mapping):
        raise InvalidCheckpoint(
            "invalid_config",
            f"config.json: text_config is {shown(nested)}; a {composite.model_type} needs an object with its decoder's "
            "configuration",
            TEXT,
        )
    kind = nested.get("model_type") or composite.decoder
    known = kind in known_families()
    view = {**ASSUMED.get(str(kind), {}), **nested, "model_type": kind}
    tied = config.get("tie_word_embeddings", composite.tied)
    view["tie_word_embeddings"] = bool(tied or (composite.tied_by_text and nested.get("tie_word_embeddings")))
    view["architectures"] = [table(str(kind)).architecture] if known else []
    if config.get("quantization_config"):
        view["quantization_config"] = config["quantization_config"]
    return view
