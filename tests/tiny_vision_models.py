"""Tiny random vision-language models with real tokenizer, image processor and chat template, written by transformers.

Each folder is what its family's folders on the hub look like, as far as serving reads it.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

import compression.runtime  # noqa: F401 (registers families that transformers lacks)
from tests.tiny_models import make_tiny_tokenizer
from tests.tiny_vision_families import FAMILIES, NAMED_TOKENS

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# The parts in their order, as the families' own templates do it.
TEMPLATE = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n{{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}}{{% else %}}{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}"
    "{mark}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def make_tiny_vision_model(
    folder: Path,
    model_type: str = "llava",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text_sizes: dict[str, int] | None = None,
) -> Path:
    """Write a random model of `model_type` with tokenizer, processor and template into `folder`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder)
    config_values, processor, preprocessor, special, mark = FAMILIES[model_type]()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE.format(mark=mark)
    tokenizer.save_pretrained(folder)
    _name_tokens(folder, NAMED_TOKENS.get(model_type, {}))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    text = TEXT | {"vocab_size": len(tokenizer)} | config_values.pop("text", {}) | (text_sizes or {})
    named = {key: _ids(tokenizer, value) for key, value in config_values.items()}
    config = AutoConfig.for_model(model_type, text_config=text, tie_word_embeddings=False, **named)
    random_vision_model(config, seed).to(dtype).save_pretrained(folder)
    return folder


def random_vision_model(config: Any, seed: int = 0) -> Any:
    """Build a model with weights, norms and biases all away from their trivial start values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scales = name.endswith("weight") and "norm" in name
                parameter.normal_(1.0 if scales else 0.0, 0.1 if parameter.ndim == 1 else 0.3)
    model.generation_config.eos_token_id = 2
    return model.eval()


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return a picture of random colours in large squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file's bytes."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _name_tokens(folder: Path, names: dict[str, str]) -> None:
    """Tell the tokenizer under which names the family's processor asks for its tokens."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


def _ids(tokenizer: PreTrainedTokenizerFast, value: Any) -> Any:
    """Replace the name of a token by its id."""
    return tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) and value.startswith(("<", "[")) else value
