"""LLaMA and what was made of it (Vicuna, Llama 2 chat), with what a delta adds, into the runtime's names.

MiniGPT-4's language model is frozen; MiniGPT-v2 adapts queries and values; ArtGPT-4 puts a bottleneck into each block
and trains some norms. It makes a list of attention and bottleneck, hence `self_attn.0` and `self_attn.1`.

Source: Vision-CAIR/MiniGPT-4 and DLYuanGod/ArtGPT-4, `minigpt4/models/`; lm-sys/FastChat `apply_delta.py`.
"""

from collections.abc import Mapping
from typing import Any

from api_schemas.errors import InvalidCheckpoint
from compression.importers.blip2_parts import DELTA
from compression.importers.ledger import Key, Ledger
from compression.importers.lora import adapter_of, merged

LANGUAGE = "language"
TARGET = "language_model."
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")
ADAPTER = tuple(f"{half}.{kind}" for half in ("down", "up") for kind in ("weight", "bias"))
RECOMPUTED = (".rotary_emb.inv_freq",)
HEAD_DIM = 128  # of every LLaMA that these families were made of
PUBLISHED_WIDTHS = (4096, 5120)
ROWS = {True: (32001, "Vicuna v0, merged with FastChat 0.1.10"), False: (32000, "Llama 2 chat")}
SMALLEST_NORM = 0.05  # mean size of a final norm's weights: about 1 in a model, about 0 in the difference of two


def without_lists(names: Mapping[str, str]) -> dict[str, str]:
    """ArtGPT-4's plain names as the runtime has them: attention under `self_attn`, the bottleneck under `adapter`."""
    return {
        name.replace(".self_attn.0.", ".self_attn.").replace(".self_attn.1.", ".adapter."): stored
        for name, stored in names.items()
    }


def use_llama(
    ledger: Ledger, names: Mapping[str, str], given: Mapping[str, Any], alpha: float, *, adapters: bool
) -> dict[str, Any]:
    """Enter the decoder into the account; return its settings.

    Args:
        ledger: with sources `language` and `delta`.
        names: of the delta's decoder tensors, by their names in the runtime.
        given: the language model's config.json.
        alpha: of LoRA adapters.
        adapters: whether each block has a bottleneck, which the delta brings.

    Raises:
        InvalidCheckpoint: `wrong_base`, `unmerged_delta` or `missing_tensor`.
    """
    base = ledger.sources[LANGUAGE]
    rows, hidden = _embedding(ledger, given)
    _refuse_difference(ledger)
    blocks = 0
    while f"model.layers.{blocks}.self_attn.q_proj.weight" in base.stored:
        blocks += 1
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        _use_newer(ledger, names, f"{name}.weight")
    for index in range(blocks):
        for norm in NORMS:
            _use_newer(ledger, names, f"model.layers.{index}.{norm}.weight")
        for linear in LINEARS:
            _use_linear(ledger, names, f"model.layers.{index}.{linear}", alpha)
        for part in ADAPTER if adapters else ():
            _use_adapter(ledger, names, f"model.layers.{index}.adapter.{part}")
    for role in (LANGUAGE, DELTA):
        ledger.drop(role, "recomputed", lambda name: name.endswith(RECOMPUTED))
    return _settings(ledger, given, rows, hidden, blocks)


def _settings(ledger: Ledger, given: Mapping[str, Any], rows: int, hidden: int, blocks: int) -> dict[str, Any]:
    base = ledger.sources[LANGUAGE]
    heads = given.get("num_attention_heads") or hidden // HEAD_DIM
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        message = (
            f"{base.label}: num_attention_heads {heads!r} does not divide its width {hidden}; give its config.json"
        )
        raise InvalidCheckpoint("invalid_config", message, "num_attention_heads")
    rope = given.get("rope_parameters") or {}
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": base.shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": base.shape("model.layers.0.self_attn.k_proj.weight")[0] * heads // hidden,
        "vocab_size": rows,
        "max_position_embeddings": given.get("max_position_embeddings") or given.get("max_sequence_length") or 2048,
        "rms_norm_eps": given.get("rms_norm_eps") or 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta", given.get("rope_theta")) or 10000.0,
        },
        "tie_word_embeddings": False,
    }


def _embedding(ledger: Ledger, given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and width of the embedding, once base and delta are known to belong together."""
    base, delta = ledger.sources[LANGUAGE], ledger.sources[DELTA]
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        if name not in base.stored:
            message = f"{base.label} is no LLaMA: it has no {name}; give the folder of the merged Vicuna or Llama 2"
            raise InvalidCheckpoint("wrong_base", message, LANGUAGE)
    rows, hidden = base.shape("model.embed_tokens.weight")
    if given.get("vocab_size") not in (None, rows):
        message = f"{base.label}: config.json says vocab_size {given['vocab_size']}, and its embedding has {rows} rows"
        raise InvalidCheckpoint("wrong_base", f"{message}; files of two versions are mixed", LANGUAGE)
    if "llama_proj.weight" not in delta.stored:
        message = f"{delta.label} has no llama_proj.weight, which every such file has; give the authors' checkpoint"
        raise InvalidCheckpoint("missing_tensor", message, "llama_proj.weight")
    wanted = delta.shape("llama_proj.weight")[0]
    if wanted != hidden:
        message = f"{base.label} has width {hidden}, and the delta's llama_proj.weight gives {wanted}"
        raise InvalidCheckpoint("wrong_base", f"{message} (4096 is the 7B, 5120 the 13B); give the other", LANGUAGE)
    return rows, hidden


def check_version(label: str, rows: int, hidden: int, *, q_former: bool) -> None:
    """Tell versions apart by the rows of the embedding, at the widths that were published.

    Raises:
        InvalidCheckpoint: `wrong_base`.
    """
    wanted, name = ROWS[q_former]
    if hidden in PUBLISHED_WIDTHS and rows != wanted:
        message = (
            f"{label} has {rows} rows of embedding; {name} has {wanted}, and with any other version answers are "
            "nonsense: give that, or say accept_base"
        )
        raise InvalidCheckpoint("wrong_base", message, LANGUAGE)


def _refuse_difference(ledger: Ledger) -> None:
    """Vicuna was published as what must be added to LLaMA; alone it is noise around zero."""
    base = ledger.sources[LANGUAGE]
    size = float(base.read("model.norm.weight").float().abs().mean())
    if size < SMALLEST_NORM:
        message = (
            f"{base.label}: the final norm's weights are {size:.3g} on average, so this is a delta that was not "
            "merged; merge it into LLaMA first (python -m fastchat.model.apply_delta, FastChat 0.1.10 for Vicuna v0)"
        )
        raise InvalidCheckpoint("unmerged_delta", message, LANGUAGE)


def _use_newer(ledger: Ledger, names: Mapping[str, str], plain: str) -> None:
    if plain not in names:
        ledger.use(TARGET + plain, Key(LANGUAGE, plain))
        return
    ledger.use(TARGET + plain, Key(DELTA, names[plain]))
    ledger.drop(LANGUAGE, "replaced_by_delta", lambda name: name == plain)


def _use_linear(ledger: Ledger, names: Mapping[str, str], module: str, alpha: float) -> None:
    adapter = adapter_of(names, module, DELTA)
    if not adapter:
        _use_newer(ledger, names, f"{module}.weight")
        return
    source = ledger.sources[DELTA]
    for key in adapter:
        if key.name not in source.stored:
            message = f"{source.label} has one half of the adapter of {module} without {key.name}"
            raise InvalidCheckpoint("missing_tensor", message, key.name)
    scale = alpha / source.shape(adapter[0].name)[0]
    ledger.use(
        f"{TARGET}{module}.weight",
        Key(LANGUAGE, f"{module}.weight"),
        *adapter,
        how=f"LoRA merged: W + {scale:g}·B·A",
        build=lambda weight, *both: merged(weight, both, scale),
    )


def _use_adapter(ledger: Ledger, names: Mapping[str, str], plain: str) -> None:
    stored = plain.replace(".adapter.", ".self_attn.1.")
    ledger.use(TARGET + plain, Key(DELTA, names.get(plain, f"llama_model.{stored}")))
