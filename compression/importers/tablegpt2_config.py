"""Reads the configurations that TableGPT2 is published with, and says what the result's configuration is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, Qwen2Config

from api_schemas.errors import InvalidCheckpoint, NotFound
from compression.runtime.tablegpt2 import TABLE_TOKEN_ID, TableGPT2Config
from preflight.strict_json import read_object, shown
from preflight.tables import CELLS, MARKUP, TEXT, TableRule

CONFIG = "config.json"
DECODER, CELL_TYPES, MARKUP_TYPES = "qwen2", ("tablegpt_contrastive", "tablegpt"), ("tablegpt_markup",)
FIXED = {
    "attentiontype": "colrow",
    "pooling": "mean",
}  # values of encoder_config that the published code is written for
SUMMARY_HEAD_DIM, QUERIES = 128, 3  # written into the published code, in no configuration
MARKUP_GROUPS = 4  # query, value and key are interleaved in so many groups of heads
ENCODER = "encoder_config."
HEAD_ROWS, MARKUP_HEAD_ROWS = 5, 3  # rows that the authors' prompts show as text


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a published folder.

    Raises:
        NotFound: `file_not_found`: there is no such folder.
        InvalidCheckpoint: `missing_config`, `invalid_config`, or `not_tablegpt2`: of another model.
    """
    if not folder.is_dir():
        raise NotFound("file_not_found", f"folder: there is no folder {folder}; give the authors' folder", "folder")
    if not (folder / CONFIG).is_file():
        raise InvalidCheckpoint("missing_config", f"{folder.name} has no {CONFIG}; give the complete folder", CONFIG)
    config = read_object(folder / CONFIG, "invalid_config")
    kind = config.get("model_type")
    if kind not in (DECODER, *CELL_TYPES, *MARKUP_TYPES):
        known = ", ".join((DECODER, *CELL_TYPES, *MARKUP_TYPES))
        message = f"{CONFIG}: model_type is {shown(kind)}; a TableGPT2 is one of {known}"
        raise InvalidCheckpoint("not_tablegpt2", message, "model_type")
    return config


def decoder_config(config: Mapping[str, Any]) -> Qwen2Config:
    """Return the configuration of the decoder, which published folders call `llm_config` or `text_config`.

    Raises:
        InvalidCheckpoint: `invalid_config`: absent, of another type, or with sizes that do not fit.
    """
    nested = config if config["model_type"] == DECODER else config.get("llm_config", config.get("text_config"))
    if not isinstance(nested, Mapping) or nested.get("model_type", DECODER) != DECODER:
        message = f"{CONFIG}: llm_config is {shown(nested)}; TableGPT2's decoder is a {DECODER}"
        raise InvalidCheckpoint("invalid_config", message, "llm_config")
    left = ("model_type", "_name_or_path", "transformers_version", "auto_map", "use_cache")
    try:
        made = Qwen2Config(**{key: value for key, value in nested.items() if key not in left})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise InvalidCheckpoint("invalid_config", f"{CONFIG}: llm_config: {error}", "llm_config") from error
    made.architectures = ["Qwen2ForCausalLM"]
    return made


def whole_config(config: Mapping[str, Any], summary_width: int) -> TableGPT2Config:
    """Return the configuration of decoder, encoder and projector.

    Args:
        config: of a published folder with a table encoder.
        summary_width: of the encoder's queries, read from the weights; not needed for Markdown.

    Raises:
        InvalidCheckpoint: `invalid_config` or `unsupported_table_encoder`, naming the value.
    """
    text = decoder_config(config)
    encoder = _object(config, "encoder_config")
    if config["model_type"] in CELL_TYPES:
        projector = _object(config, "projector_config")
        if projector.get("multihead"):
            raise _unsupported("projector_config.multihead", projector["multihead"], "false")
        settings, layers = _cells(encoder, summary_width), _count(projector, "mlp_depth", "projector_config.")
    else:
        settings, layers = _markup(encoder), _count(config, "mlp_depth")
    made = TableGPT2Config(
        text_config=text.to_dict(),
        table_encoder=settings,
        projector_layers=layers,
        table_token_id=TABLE_TOKEN_ID,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    made.architectures = ["TableGPT2ForCausalLM"]
    return made


def table_rule(config: Mapping[str, Any]) -> TableRule:
    """Return how chat shows tables to the model."""
    if config["model_type"] == DECODER:
        return TableRule(rule=TEXT, rows=HEAD_ROWS)
    encoder = _object(config, "encoder_config")
    if config["model_type"] in MARKUP_TYPES:
        place = str(config.get("placeholder_token", "<TABLE_CONTENT>"))
        return TableRule(rule=MARKUP, rows=MARKUP_HEAD_ROWS, place=place, tokens=_count(config, "encoder_max_length"))
    return TableRule(
        rule=CELLS,
        # The published code hands the two limits over in the wrong order, and so it was used.
        rows=_count(encoder, "max_cols", ENCODER),
        columns=_count(encoder, "max_rows", ENCODER),
        place=str(encoder.get("insert_embs_token", "<insert_embs>")),
        around=str(encoder.get("insert_seq_token", "<insert_sep>")),
        tokens=_count(encoder, "encoder_max_length", ENCODER),
        positions=QUERIES,
    )


def _cells(encoder: Mapping[str, Any], summary_width: int) -> dict[str, Any]:
    for name, value in FIXED.items():
        if encoder.get(name) != value:
            raise _unsupported(f"encoder_config.{name}", encoder.get(name), repr(value))
    sentence = _object(encoder, "st_config", ENCODER)
    head_dim = encoder.get("qformer_dim_head", SUMMARY_HEAD_DIM)
    if summary_width % head_dim:
        raise _unsupported("the width of encoder.qformer.q", summary_width, f"a multiple of {head_dim}")
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    )
    known = BertConfig(**{name: _count(sentence, name, f"{ENCODER}st_config.") for name in names})
    kept = {name: getattr(known, name) for name in names}
    kept |= {
        name: sentence.get(name, getattr(known, name)) for name in ("hidden_act", "layer_norm_eps", "pad_token_id")
    }
    return {
        "kind": CELLS,
        "sentence": kept,
        "blocks": _count(encoder, "depth", ENCODER),
        "heads": _count(encoder, "heads", ENCODER),
        "head_dim": _count(encoder, "dim_head", ENCODER),
        "width": summary_width,
        "summary_head_dim": head_dim,
        "queries": QUERIES,
    }


def _markup(encoder: Mapping[str, Any]) -> dict[str, Any]:
    if encoder.get("activation_function") != "gelu_new":
        raise _unsupported("encoder_config.activation_function", encoder.get("activation_function"), "'gelu_new'")
    width, heads = _count(encoder, "n_embd", ENCODER), _count(encoder, "n_head", ENCODER)
    if width % heads or heads % MARKUP_GROUPS:
        message = f"heads by {MARKUP_GROUPS}, and a width ({width}) by heads"
        raise _unsupported("encoder_config.n_head", heads, message)
    return {
        "kind": MARKUP,
        "vocabulary": _count(encoder, "vocab_size", ENCODER),
        "width": width,
        "blocks": _count(encoder, "n_layer", ENCODER),
        "heads": heads,
        "rotary": min(_count(encoder, "rotary_dim", ENCODER), width // heads),
        "eps": float(encoder.get("layer_norm_epsilon", 1e-5)),
    }


def _object(config: Mapping[str, Any], name: str, place: str = "") -> Mapping[str, Any]:
    value = config.get(name)
    if not isinstance(value, Mapping):
        message = f"{CONFIG}: {place}{name} is {shown(value)}, not an object; give the authors' {CONFIG}"
        raise InvalidCheckpoint("invalid_config", message, f"{place}{name}")
    return value


def _count(config: Mapping[str, Any], name: str, place: str = "") -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        message = f"{CONFIG}: {place}{name} is {shown(value)}, not a whole number above 0; give the authors' {CONFIG}"
        raise InvalidCheckpoint("invalid_config", message, f"{place}{name}")
    return value


def _unsupported(name: str, value: Any, wanted: str) -> InvalidCheckpoint:
    message = f"{CONFIG}: {name} is {shown(value)}; the published encoder has {wanted}, and no other is known here"
    return InvalidCheckpoint("unsupported_table_encoder", message, name)
