"""Phi-2 in the three layouts in which it was released, with TinyGPT-V's norms and adapters, into the runtime's names.

    split       q_proj, k_proj, v_proj                     microsoft/phi-2 today
    fused       query_key_value, rows by head: q, k, v     the copy that TinyGPT-V was trained on
    mixformer   Wqkv, all rows of q, then of k, then of v  microsoft/phi-2 in December 2023

Adapters and norms come from the delta, whose adapters are always for the fused rows.

Source: DLYuanGod/TinyGPT-V `modeling_phi.py`; transformers' `convert_phi_weights_to_hf.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from compression.importers.blip2_parts import DELTA
from compression.importers.ledger import Key, Ledger
from compression.importers.lora import adapter_of, merged
from preflight.strict_json import shown_list

LANGUAGE = "language"
TARGET = "language_model."
PARTS = ("q_proj", "k_proj", "v_proj")
RECOMPUTED = (".rotary_emb.inv_freq", ".inner_attn.bias", ".masked_bias")
PHI_2 = "Phi-2 (width 2560, 32 blocks, vocabulary 51200)"


@dataclass(frozen=True)
class Layout:
    """One way to name and order Phi's tensors.

    Attributes:
        name: in records.
        sign: a stored tensor that only this layout has.
        block: name of a block's tensors before the dot, with its number.
        first: number of the first block there.
        fused: what holds query, key and value, relative to the block; empty where they are apart.
        by_head: whether its rows go head by head.
        inside: the runtime's names of a block's modules to this layout's.
        outside: of modules around the blocks.
    """

    name: str
    sign: str
    block: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    first: int = 0
    fused: str = ""
    by_head: bool = False


_OUTSIDE = {name: name for name in ("model.embed_tokens", "model.final_layernorm", "lm_head")}
_INSIDE = {name: name for name in ("self_attn.dense", "mlp.fc1", "mlp.fc2", "input_layernorm")}
_MIXED = {
    "self_attn.dense": "mixer.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "input_layernorm": "ln",
}
_MIXED_HEAD = {"model.final_layernorm": "lm_head.ln", "lm_head": "lm_head.linear"}
LAYOUTS = (
    Layout("split", "model.layers.0.self_attn.q_proj.weight", "model.layers.{}.", _INSIDE, _OUTSIDE),
    Layout(
        "fused",
        "model.layers.0.self_attn.query_key_value.weight",
        "model.layers.{}.",
        _INSIDE,
        _OUTSIDE,
        fused="self_attn.query_key_value",
        by_head=True,
    ),
    Layout(
        "mixformer",
        "transformer.h.0.mixer.Wqkv.weight",
        "transformer.h.{}.",
        _MIXED,
        {"model.embed_tokens": "transformer.embd.wte", **_MIXED_HEAD},
        fused="mixer.Wqkv",
    ),
    Layout(
        "mixformer-sequential",
        "layers.1.mixer.Wqkv.weight",
        "layers.{}.",
        _MIXED,
        {
            "model.embed_tokens": "layers.0.wte",
            "model.final_layernorm": "layers.{last}.ln",
            "lm_head": "layers.{last}.linear",
        },
        first=1,
        fused="mixer.Wqkv",
    ),
)


def use_phi(ledger: Ledger, names: Mapping[str, str], alpha: float) -> dict[str, Any]:
    """Enter the decoder into the account; return its sizes as settings.

    Args:
        ledger: with sources `language` and `delta`.
        names: of the delta's decoder tensors, by their plain names.
        alpha: of the adapters.

    Raises:
        InvalidCheckpoint: `wrong_base`, `missing_tensor`.
    """
    layout = _layout_of(ledger)
    base = ledger.sources[LANGUAGE]
    blocks = 0
    while f"{layout.block.format(layout.first + blocks)}mlp.fc1.weight" in base.stored:
        blocks += 1
    outside = {ours: theirs.format(last=blocks + 1) for ours, theirs in layout.outside.items()}
    vocabulary, hidden = _embedding(ledger, f"{outside['model.embed_tokens']}.weight", names)
    norm = _from_delta(ledger, names, "model.layers.0.self_attn.q_layernorm.weight")
    head_dim = ledger.sources[DELTA].shape(norm.name)[0]
    if hidden % head_dim:
        raise _wrong_base(ledger, f"its width {hidden} is no multiple of the delta's heads of {head_dim} channels")
    for ours, theirs in outside.items():
        kinds = ("weight",) if ours == "model.embed_tokens" else ("weight", "bias")
        for kind in kinds:
            _use_newer(ledger, names, f"{ours}.{kind}", f"{theirs}.{kind}")
    for index in range(blocks):
        _use_block(ledger, names, layout, index, hidden // head_dim, alpha)
    ledger.drop(LANGUAGE, "recomputed", lambda name: name.endswith(RECOMPUTED))
    return {
        "hidden_size": hidden,
        "intermediate_size": base.shape(f"{layout.block.format(layout.first)}mlp.fc1.weight")[0],
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // head_dim,
        "vocab_size": vocabulary,
    }


def layout_name(ledger: Ledger) -> str:
    """Which layout the base has, for the record."""
    return _layout_of(ledger).name


def _layout_of(ledger: Ledger) -> Layout:
    base = ledger.sources[LANGUAGE]
    for layout in LAYOUTS:
        if layout.sign in base.stored:
            return layout
    signs = ", ".join(layout.sign for layout in LAYOUTS)
    message = f"{base.label} is no Phi: it has none of {signs}; the base of TinyGPT-V is {PHI_2}"
    raise InvalidCheckpoint("wrong_base", message, LANGUAGE)


def _wrong_base(ledger: Ledger, what: str) -> InvalidCheckpoint:
    message = f"{ledger.sources[LANGUAGE].label} is not the base of this delta: {what}; TinyGPT-V's is {PHI_2}"
    return InvalidCheckpoint("wrong_base", message, LANGUAGE)


def _embedding(ledger: Ledger, name: str, names: Mapping[str, str]) -> tuple[int, int]:
    base = ledger.sources[LANGUAGE]
    if name not in base.stored:
        raise InvalidCheckpoint("missing_tensor", f"{base.label} has no {name}; give the complete folder", name)
    vocabulary, hidden = base.shape(name)
    norm = _from_delta(ledger, names, "model.layers.0.post_layernorm.weight")
    wanted = ledger.sources[DELTA].shape(norm.name)[0]
    if wanted != hidden:
        raise _wrong_base(ledger, f"{name} has width {hidden}, and the delta's {norm.name} has {wanted}")
    return vocabulary, hidden


def _from_delta(ledger: Ledger, names: Mapping[str, str], plain: str) -> Key:
    """A tensor that no base has, so that the delta must."""
    if plain not in names:
        source = ledger.sources[DELTA]
        norms = [name for name in names if name.endswith("layernorm.weight")]
        message = (
            f"{source.label} has no llama_model.{plain}: TinyGPT-V's norms are trained and no Phi-2 has them; it has "
            f"{shown_list(norms, 3) or 'no norm at all'}"
        )
        raise InvalidCheckpoint("missing_tensor", message, f"llama_model.{plain}")
    return Key(DELTA, names[plain])


def _use_newer(ledger: Ledger, names: Mapping[str, str], plain: str, base: str) -> None:
    """The delta's tensor where it has one, else the base's."""
    if plain not in names:
        ledger.use(TARGET + plain, Key(LANGUAGE, base))
        return
    ledger.use(TARGET + plain, Key(DELTA, names[plain]))
    ledger.drop(LANGUAGE, "replaced_by_delta", lambda name: name == base)


def _use_block(ledger: Ledger, names: Mapping[str, str], layout: Layout, index: int, heads: int, alpha: float) -> None:
    theirs, plain = layout.block.format(layout.first + index), f"model.layers.{index}."
    for ours, module in layout.inside.items():
        _use_newer_or_merged(ledger, names, plain + ours, theirs + module, alpha)
    for part in range(len(PARTS)):
        _use_part(ledger, names, layout, (theirs, plain), part, heads, alpha)
    for norm in ("self_attn.q_layernorm", "self_attn.k_layernorm"):
        ledger.use(f"{TARGET}{plain}{norm}.weight", _from_delta(ledger, names, f"{plain}{norm}.weight"))
        _use_norm_bias(ledger, names, f"{plain}{norm}")
    ledger.use(f"{TARGET}{plain}post_layernorm.weight", _from_delta(ledger, names, f"{plain}post_layernorm.weight"))


def _use_norm_bias(ledger: Ledger, names: Mapping[str, str], norm: str) -> None:
    if f"{norm}.bias" in names:
        ledger.use(f"{TARGET}{norm}.bias", Key(DELTA, names[f"{norm}.bias"]))
        return
    length = ledger.sources[DELTA].shape(names[f"{norm}.weight"])[0]
    ledger.use(
        f"{TARGET}{norm}.bias",
        how="zeros, as it began: the authors never train it, and no file has it",
        build=lambda: torch.zeros(length),
    )


def _use_newer_or_merged(ledger: Ledger, names: Mapping[str, str], plain: str, base: str, alpha: float) -> None:
    adapter = adapter_of(names, plain, DELTA)
    _use_newer(ledger, names, f"{plain}.bias", f"{base}.bias")
    if not adapter:
        _use_newer(ledger, names, f"{plain}.weight", f"{base}.weight")
        return
    scale = alpha / _rank(ledger, adapter)
    ledger.use(
        f"{TARGET}{plain}.weight",
        Key(LANGUAGE, f"{base}.weight"),
        *adapter,
        how=f"LoRA merged: W + {scale:g}·B·A",
        build=lambda weight, *both: merged(weight, both, scale),
    )


def _rank(ledger: Ledger, adapter: tuple[Key, ...]) -> int:
    source, name = ledger.sources[DELTA], adapter[0].name
    if name not in source.stored:
        raise InvalidCheckpoint(
            "missing_tensor", f"{source.label} has {adapter[1].name} without its other half {name}", name
        )
    return source.shape(name)[0]


def _use_part(
    ledger: Ledger,
    names: Mapping[str, str],
    layout: Layout,
    blocks: tuple[str, str],
    part: int,
    heads: int,
    alpha: float,
) -> None:
    """Query, key or value: its rows of the base, and the same rows of the adapter's second half."""
    theirs, plain = blocks
    target = f"{TARGET}{plain}self_attn.{PARTS[part]}"
    stored = theirs + (layout.fused or f"self_attn.{PARTS[part]}")
    adapter = adapter_of(names, f"{plain}self_attn.query_key_value", DELTA)
    scale = alpha / _rank(ledger, adapter) if adapter else 0.0
    which = f"the {('query', 'key', 'value')[part]}'s rows" if layout.fused else "copied"

    def of_base(tensor: Tensor) -> Tensor:
        if not layout.fused:
            return tensor
        return rows_by_head(tensor, heads, part) if layout.by_head else tensor.chunk(3)[part]

    def weight(base: Tensor, *both: Tensor) -> Tensor:
        halves = (both[0], rows_by_head(both[1], heads, part)) if both else ()
        return merged(of_base(base), halves, scale)

    how = f"{which}, LoRA merged: W + {scale:g}·B·A" if adapter else which
    ledger.use(f"{target}.weight", Key(LANGUAGE, f"{stored}.weight"), *adapter, how=how, build=weight)
    ledger.use(f"{target}.bias", Key(LANGUAGE, f"{stored}.bias"), how=which, build=of_base)


def rows_by_head(fused: Tensor, heads: int, part: int) -> Tensor:
    """Take one of three parts whose rows lie head by head: `[heads · 3 · head_dim, …]` to `[heads · head_dim, …]`."""
    return fused.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
