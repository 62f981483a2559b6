"""What comes beside mPLUG-2's weights: the sizes in its authors' BERT configuration, and BERT's tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BertTokenizer

from api_schemas.errors import InvalidCheckpoint, NotFound
from preflight.strict_json import read_object, shown

PROMPT = "a video of"  # captions were learned behind it; what comes before and with it is cut off
UNIVERSAL, LATENTS = 2, 50  # written into the published code
# What the model reads of a message: the words of a question. Frames stand in the message's parts.
CHAT_TEMPLATE = (
    "{%- set content = messages[0].content -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
)
FIXED = {"hidden_act": "gelu", "num_uni_layer": UNIVERSAL}


@dataclass(frozen=True)
class BertSizes:
    """Sizes of text encoder, fusion encoder and decoder, which share one configuration.

    Attributes:
        width: of all of them.
        heads: of each attention.
        inner: width inside an MLP.
        eps: of norms.
        vocabulary: tokens.
        positions: most tokens of a text.
        types: of tokens.
        text_layers: of the text encoder.
        fusion_layers: that the fusion encoder has.
        fusion_run: of these, from the last, are run.
        decoder_layers: of the decoder.
    """

    width: int
    heads: int
    inner: int
    eps: float
    vocabulary: int
    positions: int
    types: int
    text_layers: int
    fusion_layers: int
    fusion_run: int
    decoder_layers: int
    universal: int = UNIVERSAL

    def text(self, layers: int) -> dict[str, Any]:
        """`text` of the result's configuration, with so many layers."""
        names = ("width", "heads", "inner", "eps", "vocabulary", "positions", "types")
        return {name: getattr(self, name) for name in names} | {"layers": layers, "latents": LATENTS}

    def decoder(self, pad: int) -> dict[str, Any]:
        """`decoder` of the result's configuration, as BERT's own says it."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.decoder_layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.types,
            "layer_norm_eps": self.eps,
            "pad_token_id": pad,
        }


def read_sizes(path: Path) -> BertSizes:
    """Read the authors' `config_bert_large_text.json`.

    Raises:
        NotFound: `file_not_found`.
        InvalidCheckpoint: `invalid_config`, naming the value.
    """
    if not path.is_file():
        raise NotFound("file_not_found", f"bert_config: there is no file {path}; give the authors' JSON", "bert_config")
    config = read_object(path, "invalid_config")
    for name, value in FIXED.items():
        if config.get(name) != value:
            raise _wrong(path, name, config.get(name), f"the published code is written for {value!r}")
    count = {name: _count(path, config, name) for name in _COUNTS}
    if count["fusion_layers"] > count["num_hidden_layers"]:
        raise _wrong(path, "fusion_layers", count["fusion_layers"], "more than num_hidden_layers")
    if count["stride_layer"] < count["fusion_layers"]:
        raise _wrong(path, "stride_layer", count["stride_layer"], "fusion by concatenation is not known here")
    if min(count["text_encoder_layers"], count["text_decode_layers"]) < UNIVERSAL:
        raise _wrong(path, "text_encoder_layers", count["text_encoder_layers"], f"at least {UNIVERSAL} are needed")
    return BertSizes(
        width=count["hidden_size"],
        heads=count["num_attention_heads"],
        inner=count["intermediate_size"],
        eps=float(config.get("layer_norm_eps", 1e-12)),
        vocabulary=count["vocab_size"],
        positions=count["max_position_embeddings"],
        types=count["type_vocab_size"],
        text_layers=count["text_encoder_layers"],
        fusion_layers=count["num_hidden_layers"],
        fusion_run=count["fusion_layers"],
        decoder_layers=count["text_decode_layers"],
    )


_COUNTS = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_hidden_layers",
    "text_encoder_layers",
    "fusion_layers",
    "text_decode_layers",
    "stride_layer",
)


def read_tokenizer(folder: Path) -> Any:
    """Read BERT's tokenizer.

    Raises:
        NotFound: `file_not_found`.
        InvalidCheckpoint: `tokenizer_missing`.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        message = f"tokenizer: {folder} has neither tokenizer.json nor vocab.txt; give bert-large-uncased's folder"
        raise NotFound("file_not_found", message, "tokenizer")
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library names no common base for what a damaged folder can raise
        message = f"tokenizer: {folder.name} cannot be read: {type(error).__name__}: {error}; download it again"
        raise InvalidCheckpoint("tokenizer_missing", message, "tokenizer") from error
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _count(path: Path, config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise _wrong(path, name, value, "a whole number above 0 is needed")
    return value


def _wrong(path: Path, name: str, value: Any, why: str) -> InvalidCheckpoint:
    message = f"{path.name}: {name} is {shown(value)}: {why}; give configs/config_bert_large_text.json of the authors"
    return InvalidCheckpoint("invalid_config", message, name)
