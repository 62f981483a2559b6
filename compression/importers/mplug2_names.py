"""Where each tensor of an imported mPLUG-2 stands in the published file, and how it is made where it differs."""

from collections.abc import Callable

from torch import Tensor

from compression.importers.mplug2_files import BertSizes
from compression.runtime.mplug2 import MPlug2Config

VISUAL, TEXT, FUSION = "visual_encoder.visual", "text_encoder", "fusion_encoder"
Origin = tuple[str, str, Callable[[Tensor], Tensor] | None]
_ATTENTION = {
    "query": "self.query",
    "key": "self.key",
    "value": "self.value",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
_MLP = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
_EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}
_BLOCK = {
    "attention_norm": "ln_1",
    "output": "attn.out_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_VISION = {
    "class_token": "class_embedding",
    "positions": "positional_embedding",
    "norm_before.weight": "ln_pre.weight",
    "norm_before.bias": "ln_pre.bias",
    "norm_after.weight": "ln_post.weight",
    "norm_after.bias": "ln_post.bias",
}
_ROWS = ("query", "key", "value")


def origin_of(target: str, config: MPlug2Config, sizes: BertSizes) -> Origin:
    """The published tensor of a target; where it is not the same one, in what words and how it is made."""
    part, _, inner = target.partition(".")
    if part == "text_decoder":
        return target, "", None
    if part == "vision":
        return _vision_origin(inner)
    plain = {"vision_norm": "visn_emb_norm", "vision_linear": "visn_fc", "vision_linear_norm": "visn_layer_norm"}
    if part in plain:
        return f"{plain[part]}.{inner}", "", None
    if part == "fusion":
        return _layer_name(f"{FUSION}.encoder.layer", inner, sizes.fusion_layers - sizes.fusion_run), "", None
    if inner == "latents":
        return f"{TEXT}.encoder.layer.{sizes.text_layers - sizes.universal}.latents", "", None
    kind, _, rest = inner.partition(".")
    if kind == "embeddings":
        name, leaf = rest.split(".")
        return f"{TEXT}.embeddings.{_EMBEDDINGS[name]}.{leaf}", "", None
    return _layer_name(f"{TEXT}.encoder.layer", rest, sizes.text_layers - _kept(config, sizes)), "", None


def _kept(config: MPlug2Config, sizes: BertSizes) -> int:
    """Layers of the text encoder that the task runs."""
    return sizes.text_layers if config.task == "question" else sizes.universal


def _layer_name(prefix: str, inner: str, below: int) -> str:
    """Ours counts the layers that are kept; the published file counts those below them too."""
    index, part, linear, leaf = inner.split(".")
    number = int(index) + below
    if part == "mlp":
        return f"{prefix}.{number}.{_MLP[linear]}.{leaf}"
    return f"{prefix}.{number}.{'attention' if part == 'attention' else 'crossattention'}.{_ATTENTION[linear]}.{leaf}"


def _vision_origin(inner: str) -> Origin:
    if inner in _VISION:
        return f"{VISUAL}.{_VISION[inner]}", "", None
    if inner == "patches.weight":
        return f"{VISUAL}.conv1.weight", "a patch's pixels in one row", lambda kernel: kernel.flatten(1)
    _, index, part, *rest = inner.split(".")
    block = f"{VISUAL}.transformer.resblocks.{index}"
    if part in ("before", "between"):
        return _over_time(f"{block}.{'lmhra1' if part == 'before' else 'lmhra2'}", *rest)
    if part not in _ROWS:
        return f"{block}.{_BLOCK[part]}.{rest[0]}", "", None
    place = _ROWS.index(part)

    def build(fused: Tensor) -> Tensor:
        return fused.chunk(3)[place]

    return f"{block}.attn.in_proj_{rest[0]}", f"the rows of the {part}", build


def _over_time(prefix: str, part: str, leaf: str) -> Origin:
    if part == "norm":
        return f"{prefix}.ln.{leaf}", "", None
    if part == "mix":
        name = f"{prefix}.conv.{leaf}"
        return (name, "over time alone", lambda kernel: kernel.flatten(2)) if leaf == "weight" else (name, "", None)
    name = f"{prefix}.{part}_proj.{leaf}"
    return (name, "of one pixel", lambda kernel: kernel.flatten(1)) if leaf == "weight" else (name, "", None)
