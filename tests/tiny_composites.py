"""Tiny vision-language models of stock classes with a real processor, the same bytes on every run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics3Processor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.tiny_models import PECULIARITIES, make_tiny_tokenizer

IMAGE, PATCH = 28, 14  # four patches an image
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
IMAGE_TOKEN = 384  # after the 384 of the tokenizer
KINDS: dict[str, dict[str, Any]] = {  # what makes a composite itself
    "llava": {"vision_config": CLIP, "image_token_index": IMAGE_TOKEN},
    "idefics3": {"vision_config": TOWER, "image_token_id": IMAGE_TOKEN, "scale_factor": 1},
    "smolvlm": {"vision_config": TOWER, "image_token_id": IMAGE_TOKEN, "scale_factor": 1},
}


def _processor(kind: str, tokenizer: Any) -> Any:
    """The stock processor of a kind; None where it needs packages that this project does without."""
    if kind == "llava":
        pictures = CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
        return LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if kind == "idefics3":
        edge = {"longest_edge": IMAGE}
        pictures = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        return Idefics3Processor(pictures, tokenizer, image_seq_len=4)
    return None


def make_tiny_composite(
    folder: Path,
    kind: str = "llava",
    decoder: str = "llama",
    *,
    tied: bool = False,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 32,
    intermediate: int = 48,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Write a random model of several parts with its tokenizer into `folder`, and return the folder.

    Args:
        folder: where to write; made when absent.
        kind: `model_type` of the whole.
        decoder: `model_type` of its decoder.
        tied: whether the head is the embedding.
        kv_heads: key and value heads per block; 4 query heads share them.
        head_dim: channels per head.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        layers: decoder blocks.
        dtype: of all weights.
        seed: of the weights.
        more: further values of the decoder's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    (_processor(kind, tokenizer) or tokenizer).save_pretrained(folder)
    text = {
        "model_type": decoder,
        "vocab_size": 392,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
        **PECULIARITIES.get(decoder, {}),
        **more,
    }
    config = AutoConfig.for_model(kind, text_config=text, tie_word_embeddings=tied, **KINDS[kind])
    random_composite(config, dtype, seed).save_pretrained(folder)
    return folder


def random_composite(config: object, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """Build the model of a configuration with all weights away from their trivial start values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scales = name.endswith("weight") and "norm" in name and parameter.ndim == 1
                parameter.normal_(1.0 if scales else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    return model.to(dtype).eval()


def respell(folder: Path, *renames: tuple[str, str]) -> Path:
    """Rename tensors on disk by prefix, as releases of other ages have them."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        new = next((to + name.removeprefix(at) for at, to in renames if name.startswith(at)), name)
        tensors[new] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
