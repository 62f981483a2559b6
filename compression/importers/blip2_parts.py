"""EVA ViT-g and BLIP-2's Q-Former, as MiniGPT-4 and all that is built on it download them, into the runtime's names.

    eva_vit_g.pth                    cls_token, pos_embed, patch_embed.*, blocks.N.*
    blip2_pretrained_flant5xxl.pth   ln_vision.*, query_tokens, Qformer.bert.*, and branches that are not run here

Source: DLYuanGod/TinyGPT-V `minigpt4/models/{eva_vit,Qformer,minigpt4}.py`; salesforce/LAVIS `eva_vit.py`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from compression.importers.ledger import Key, Ledger

VISION, Q_FORMER, DELTA = "vision", "q_former", "delta"
RULES = {
    "unused_vision": "norm, head and mask token after the ViT's blocks, and blocks beyond its depth: not run here",
    "text_branch": "the Q-Former's reading of text (embeddings, feed-forward, head), which is not run here",
    "other_heads": "projections and heads of BLIP-2's own tasks",
    "recomputed": "buffers that the model computes itself",
    "replaced_by_delta": "the delta has its own",
}
VIT_DEPTH = 39  # of ViT-g as BLIP-2 cuts it; the file may have more blocks
_AFTER_BLOCKS = re.compile(r"(norm|fc_norm|head|lm_head)\.|mask_token$")
_OTHER_HEADS = re.compile(r"(t5_proj|opt_proj|llm_proj|llama_proj|vision_proj|text_proj|itm_head)\.|temp$")
_TEXT = re.compile(
    r"Qformer\.(cls\.|bert\.(pooler\.|embeddings\.(word|position)_embeddings\.|encoder\.layer\.\d+\.(intermediate|output)\.))"
)
_BLOCK = {
    "norm1.weight": "layer_norm1.weight",
    "norm1.bias": "layer_norm1.bias",
    "norm2.weight": "layer_norm2.weight",
    "norm2.bias": "layer_norm2.bias",
    "attn.qkv.weight": "self_attn.qkv.weight",
    "attn.proj.weight": "self_attn.projection.weight",
    "attn.proj.bias": "self_attn.projection.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}


def use_vision(ledger: Ledger, image_size: int, heads: int) -> dict[str, Any]:
    """Enter the ViT into the account; return its configuration.

    Args:
        ledger: with a source `vision`.
        image_size: in pixels; positions are resized where the file's are for another size.
        heads: of attention, which no shape tells.

    Raises:
        InvalidCheckpoint: `missing_tensor`, `invalid_image_size` or `invalid_heads`.
    """
    source = ledger.sources[VISION]
    patch = _shape(ledger, "patch_embed.proj.weight", 4)
    width, pixels = patch[0], patch[-1]
    _check_sizes(image_size, pixels, width, heads)
    found = {int(name.split(".")[1]) for name in source.stored if re.match(r"blocks\.\d+\.", name)}
    depth = min(len(found), VIT_DEPTH)
    before = "vision_model.embeddings."
    ledger.use(f"{before}class_embedding", Key(VISION, "cls_token"))
    ledger.use(f"{before}patch_embedding.weight", Key(VISION, "patch_embed.proj.weight"))
    ledger.use(f"{before}patch_embedding.bias", Key(VISION, "patch_embed.proj.bias"))
    _use_positions(ledger, f"{before}position_embedding", image_size // pixels)
    for index in range(depth):
        block, ours = f"blocks.{index}.", f"vision_model.encoder.layers.{index}."
        for theirs, name in _BLOCK.items():
            ledger.use(ours + name, Key(VISION, block + theirs))
        ledger.use(
            f"{ours}self_attn.qkv.bias",
            Key(VISION, f"{block}attn.q_bias"),
            Key(VISION, f"{block}attn.v_bias"),
            how="query's, zeros for the key, value's",
            build=lambda query, value: torch.cat([query, torch.zeros_like(query), value]),
        )
    ledger.drop(VISION, "unused_vision", lambda name: bool(_AFTER_BLOCKS.match(name)) or _block_of(name) >= depth)
    return {
        "hidden_size": width,
        "intermediate_size": _shape(ledger, "blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": pixels,
    }


def _block_of(name: str) -> int:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _shape(ledger: Ledger, name: str, rank: int) -> tuple[int, ...]:
    source = ledger.sources[VISION]
    if name not in source.stored or len(source.shape(name)) != rank:
        message = f"{source.label} has no {name} of {rank} dimensions: it is no eva_vit_g.pth"
        raise InvalidCheckpoint("missing_tensor", message, name)
    return source.shape(name)


def _check_sizes(image_size: int, pixels: int, width: int, heads: int) -> None:
    if image_size < pixels or image_size % pixels:
        message = f"image_size {image_size} is no multiple of the ViT's patches of {pixels} pixels; 224 or 448 is usual"
        raise InvalidCheckpoint("invalid_image_size", message, "image_size")
    if heads < 1 or width % heads:
        message = f"vision_heads {heads} does not divide the ViT's width {width}; ViT-g has 16"
        raise InvalidCheckpoint("invalid_heads", message, "vision_heads")


def _use_positions(ledger: Ledger, target: str, grid: int) -> None:
    """Positions as they are, or resized as the original does while it loads: bicubic, corners not aligned."""
    stored = ledger.sources[VISION].stored.get("pos_embed")
    here = 0 if stored is None else math.isqrt(max(int(stored.shape[1]) - 1, 0))
    how = "copied" if here == grid else f"resized from {here} × {here} to {grid} × {grid} patches, bicubic"
    ledger.use(target, Key(VISION, "pos_embed"), how=how, build=lambda positions: resized(positions, grid))


def resized(positions: Tensor, grid: int) -> Tensor:
    """Resize `[1, 1 + patches, width]` to `grid × grid` patches; the first row, of the class token, stays."""
    here = math.isqrt(positions.shape[1] - 1)
    if here == grid:
        return positions
    patches = positions[:, 1:].float().reshape(1, here, here, -1).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), larger.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def use_ln_vision(ledger: Ledger) -> None:
    """The norm after the ViT: of the delta where it has one, else of BLIP-2's file."""
    for kind in ("weight", "bias"):
        role = DELTA if f"ln_vision.{kind}" in ledger.sources[DELTA].stored else Q_FORMER
        ledger.use(f"vision_model.post_layernorm.{kind}", Key(role, f"ln_vision.{kind}"))


def use_q_former(ledger: Ledger, heads: int) -> dict[str, Any]:
    """Enter Q-Former and queries into the account; return the Q-Former's configuration with `num_query_tokens`.

    A delta that trained the Q-Former carries it whole, and it wins: that is read off its keys, never off a setting.

    Raises:
        InvalidCheckpoint: `missing_tensor`, `invalid_heads`, or `unexpected_tensor` for cross-attention at odd places.
    """
    trained = any(name.startswith("Qformer.bert.encoder.") for name in ledger.sources[DELTA].stored)
    role = DELTA if trained else Q_FORMER
    source = ledger.sources[role]
    prefix = "Qformer.bert."
    layers: dict[int, set[str]] = {}
    for name in sorted(source.stored):
        if not name.startswith(prefix) or _TEXT.match(name) or name.endswith("position_ids"):
            continue
        ours = name.removeprefix(prefix).replace("embeddings.LayerNorm.", "layernorm.")
        ours = ours.replace("attention.self.", "attention.attention.")
        ledger.use(f"qformer.{ours}", Key(role, name))
        found = re.match(r"encoder\.layer\.(\d+)\.(\w+)\.", ours)
        if found:
            layers.setdefault(int(found[1]), set()).add(found[2])
    ledger.use("query_tokens", Key(role if "query_tokens" in source.stored else Q_FORMER, "query_tokens"))
    _drop_rest(ledger, trained)
    return _q_former_settings(ledger, role, layers, heads)


def _drop_rest(ledger: Ledger, trained: bool) -> None:
    for role in (Q_FORMER, DELTA):
        ledger.drop(role, "recomputed", lambda name: name.endswith("embeddings.position_ids"))
        ledger.drop(role, "text_branch", lambda name: bool(_TEXT.match(name)))
    ledger.drop(Q_FORMER, "other_heads", lambda name: bool(_OTHER_HEADS.match(name)))
    replaced: Callable[[str], bool] = lambda name: name in ledger.sources[DELTA].stored  # noqa: E731
    ledger.drop(Q_FORMER, "replaced_by_delta", lambda name: trained and replaced(name))


def _q_former_settings(ledger: Ledger, role: str, layers: dict[int, set[str]], heads: int) -> dict[str, Any]:
    source = ledger.sources[role]
    crossed = sorted(index for index, parts in layers.items() if "crossattention" in parts)
    every = crossed[1] if len(crossed) > 1 else max(len(layers), 1)
    if not layers or crossed != list(range(0, len(layers), every)):
        message = (
            f"{source.label}: cross-attention in layers {crossed} of {len(layers)}; a Q-Former has it at intervals"
        )
        raise InvalidCheckpoint("unexpected_tensor", message, "Qformer")
    queries = ledger.sources[ledger.entries["query_tokens"].keys[0].role].shape("query_tokens")
    if heads < 1 or queries[-1] % heads:
        message = f"q_former_heads {heads} does not divide the Q-Former's width {queries[-1]}; BLIP-2's has 12"
        raise InvalidCheckpoint("invalid_heads", message, "q_former_heads")
    inner = ledger.entries.get("qformer.encoder.layer.0.intermediate_query.dense.weight")
    return {
        "hidden_size": queries[-1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "intermediate_size": source.shape(inner.keys[0].name)[0] if inner else 4 * queries[-1],
        "cross_attention_frequency": every,
        "num_query_tokens": queries[1],
    }
