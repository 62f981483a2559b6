"""Vision-language models with a narrowed decoder in the inference process, with their images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from api_schemas.inference import ChatRequest
from compression.core.artifact import Result, write_artifact
from preflight.checkpoint import open_checkpoint
from tests.compression.walks import random_tokens, step, walk
from tests.tiny_vision_models import encoded, make_tiny_vision_model, picture
from workers.inference.generation import generate
from workers.inference.images.reading import ImageFile
from workers.inference.loading import load, plan_load
from workers.inference.prompts import chat_task
from workers.inference.registry import ModelSource

URL = {"url": "data:image/png;base64,"}


@pytest.mark.parametrize("layout", ["portable", "full"])
@pytest.mark.parametrize("kind", ["llava", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_narrowed_model_is_served_with_its_images(tmp_path: Path, kind: Any, layout: str) -> None:
    folder, target = make_tiny_vision_model(tmp_path / "m", kind), tmp_path / "a"
    done = walk(folder, step(layout=layout), random_tokens(4, 32))
    side = open_checkpoint(folder).side_files
    write_artifact(Result(done.model, done.config, side, done.store, done.method.shapes, layout), target, {})
    loaded = load(plan_load(ModelSource("a", target, 1.0)))
    parts = [{"type": "image_url", "image_url": URL}, {"type": "text", "text": "What is this?"}]
    body = {"model": "a", "messages": [{"role": "user", "content": parts}], "max_tokens": 5, "temperature": 0}
    file = ImageFile("messages.0.content.0", encoded(picture(0)), 10**6)
    pieces = list(generate(loaded, chat_task(loaded, ChatRequest.model_validate(body), (file,)), lambda: False))
    assert pieces
    stock, tokens = AutoModelForImageTextToText.from_pretrained(target).eval(), random_tokens(1, 12)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(tokens).logits.float(), stock(tokens).logits, rtol=1e-3, atol=1e-3)
