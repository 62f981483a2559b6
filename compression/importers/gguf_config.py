"""Reads a Llama's configuration out of a GGUF file's keys."""

from typing import Any

import numpy as np
from gguf import GGUFReader
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from api_schemas.errors import InvalidCheckpoint

SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise InvalidCheckpoint("invalid_gguf", f"the GGUF file has no {key!r}; convert the model again", key)
    return default


def _decimal(value: float) -> float:
    """Undo the noise of a float32: 9.999999747378752e-06 is meant as 1e-05."""
    return float(str(np.float32(value)))


def _count(reader: GGUFReader, key: str, default: int | None = None) -> int:
    value = _value(reader, key, default)
    if not isinstance(value, int) or value < 1:
        raise InvalidCheckpoint("invalid_gguf", f"{key} is {value!r}, not a whole number above 0", key)
    return value


def _refuse(what: str, key: str) -> InvalidCheckpoint:
    remedy = "only a plain 'llama' can be imported from GGUF, push the original safetensors instead"
    return InvalidCheckpoint("unsupported_architecture", f"the GGUF file has {what}: {remedy}", key)


def _check_architecture(reader: GGUFReader, head_dim: int) -> None:
    rotary = _count(reader, "llama.rope.dimension_count", head_dim)
    scaling = _value(reader, "llama.rope.scaling.type", "none")
    experts = _value(reader, "llama.expert_count", 0)
    if rotary != head_dim:
        raise _refuse(f"{rotary} rotary of {head_dim} head dimensions", "llama.rope.dimension_count")
    if scaling != "none":
        raise _refuse(f"rotary scaling {scaling!r}", "llama.rope.scaling.type")
    if experts:
        raise _refuse(f"{experts} experts", "llama.expert_count")


def read_config(reader: GGUFReader) -> LlamaConfig:
    """Return what transformers needs to build the model.

    Raises:
        InvalidCheckpoint: `unsupported_architecture`, `missing_tensor` or `invalid_gguf`.
    """
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise _refuse(f"architecture {architecture!r}", "general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InvalidCheckpoint("missing_tensor", "the GGUF file has no tensor 'token_embd.weight'", "source")
    width = _count(reader, "llama.embedding_length")
    heads = _count(reader, "llama.attention.head_count")
    head_dim = _count(reader, "llama.attention.key_length", width // heads)
    _check_architecture(reader, head_dim)
    try:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            vocab_size=int(tensors["token_embd.weight"].shape[-1]),
            hidden_size=width,
            intermediate_size=_count(reader, "llama.feed_forward_length"),
            num_hidden_layers=_count(reader, "llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=_count(reader, "llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=_count(reader, "llama.context_length"),
            rms_norm_eps=_decimal(_value(reader, "llama.attention.layer_norm_rms_epsilon")),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": _decimal(_value(reader, "llama.rope.freq_base", 10000.0)),
            },
            tie_word_embeddings="output.weight" not in tensors,
            **{name: _token_id(reader, key) for name, key in SPECIAL_IDS.items()},
        )
    except (StrictDataclassError, ValueError) as error:
        raise InvalidCheckpoint("invalid_gguf", f"the GGUF file's sizes do not fit together: {error}") from error


def _token_id(reader: GGUFReader, key: str) -> int | None:
    field = reader.get_field(key)
    return None if field is None else int(field.contents())
