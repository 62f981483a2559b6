"""The table of architectures whose text decoder is one part of several: one row each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Spelling = tuple[tuple[str, str], ...]  # prefixes on disk with those of the text model; the blocks' comes first
REDUCED = "modepress_"  # before the `model_type` of a layout `full` that has a class of its own for the whole

OLD: Spelling = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
NEW: Spelling = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
BARE: Spelling = (("model.", "model."), ("lm_head.", "lm_head."))
TEXT_MODEL: Spelling = (("model.text_model.", "model."), ("lm_head.", "lm_head."))


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
        may_be_flat: whether releases have the decoder's values beside the whole's, without a `text_config`.
        fixed_decoder: whether the stock class makes its decoder by name, so that layout `full` needs a class of its own
            for the whole; its `block_shapes` stand beside the whole's values.
        blind: why images cannot be shown to its decoder in calibration; empty where they can.
        shares_mlp_width: whether the projector takes a width of its own from the decoder's `intermediate_size`.
        ours: whether the class of the whole is in `compression.runtime`: transformers has none.
        unshrunk: why nothing can be removed from its decoder; empty where it can.
        reads: what the tower is for; its part is called vision or table_encoder accordingly.
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
    may_be_flat: bool = False
    fixed_decoder: bool = False
    blind: str = ""
    shares_mlp_width: bool = False
    ours: bool = False
    unshrunk: str = ""
    reads: Literal["image", "table"] = "image"

    @property
    def decoder_in_memory(self) -> str:
        """The module of the whole class that holds the decoder's blocks."""
        return self.spellings[-1][0][0].removesuffix(".")

    @property
    def tower(self) -> str:
        """What the part is called that reads what is no text."""
        return "vision" if self.reads == "image" else "table_encoder"

    def part_of(self, name: str) -> str:
        """The part that a tensor outside the decoder belongs to."""
        if any(word in name for word in self.projector):
            return "projector"
        return self.tower if any(word in name for word in self.vision) else "other"


def _llava(model_type: str, architecture: str, *, tied_by_text: bool = False) -> Composite:
    projector = ("multi_modal_projector.", "image_newline")
    return Composite(model_type, architecture, projector=projector, tied_by_text=tied_by_text)


def _idefics(model_type: str, architecture: str, decoder: str = "llama") -> Composite:
    return Composite(model_type, architecture, ("vision_model.",), ("connector.",), decoder, spellings=(TEXT_MODEL,))


def _qwen_vl(model_type: str, architecture: str) -> Composite:
    return Composite(
        model_type,
        architecture,
        vision=("visual.",),
        projector=("visual.merger.",),
        decoder=f"{model_type}_text",
        decoders=(f"{model_type}_text",),
        spellings=(BARE, NEW),
        tied_by_text=True,
        may_be_flat=True,
        fixed_decoder=True,
        blind="the tokens of an image have positions on three axes, and the walk counts on one",
    )


def _image_chat(model_type: str, architecture: str, decoder: str) -> Composite:
    return Composite(
        model_type,
        architecture,
        vision=("vision_model.",),
        projector=("qformer.", "query_tokens", "language_projection"),  # the last is a linear itself
        decoder=decoder,
        decoders=(decoder,),
        spellings=(OLD,),
        ours=True,
    )


_ROWS = (
    _image_chat("minigpt4", "MiniGpt4ForConditionalGeneration", "llama"),
    replace(_image_chat("tinygptv", "TinyGptvForConditionalGeneration", "tinygptv_phi"), fixed_decoder=True),
    replace(
        _image_chat("artgpt4", "ArtGpt4ForConditionalGeneration", "artgpt4_llama"),
        unshrunk="between attention and MLP its blocks have a bottleneck on the stream itself, which no half of a "
        "block may be run without or twice",
    ),
    Composite(
        "tablegpt2",
        "TableGPT2ForCausalLM",
        vision=("table_encoder.",),
        projector=("projector.",),
        decoder="qwen2",
        decoders=("qwen2",),
        spellings=(OLD,),
        blind="tables stand among the words, and no images",
        ours=True,
        reads="table",
    ),
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
    _qwen_vl("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    _qwen_vl("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    replace(
        _qwen_vl("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        projector=("visual.merger.", "visual.deepstack_merger_list."),
        spellings=(NEW,),
        tied_by_text=False,
        may_be_flat=False,
    ),
    Composite(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        decoder="gemma3_text",
        decoders=("gemma3_text",),
        tied=True,
        fixed_decoder=True,
        blind="the tokens of an image see each other in both directions, and the walk has causal masks only",
    ),
)
COMPOSITES = {row.model_type: row for row in _ROWS}
_QWEN_VL_TEXT: Mapping[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
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
    "qwen2_vl_text": _QWEN_VL_TEXT,
    "qwen2_5_vl_text": _QWEN_VL_TEXT,
    "qwen3_vl_text": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 128000,
    },
    "gemma3_text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
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


def reduced_architecture(composite: Composite) -> str:
    """The name of the class that loads layout `full` where the stock class cannot."""
    return f"Modepress{composite.architecture}"
